{{- define "stiefel.databaseHost" -}}
{{- if .Values.postgresql.enabled -}}
{{- printf "%s-postgresql" (include "stiefel.fullname" .) -}}
{{- else -}}
{{- .Values.database.host -}}
{{- end -}}
{{- end }}

{{/* A server of the release listens on the usual port, whatever the values say of another. */}}
{{- define "stiefel.databasePort" -}}
{{- if .Values.postgresql.enabled }}5432{{ else }}{{ .Values.database.port }}{{ end -}}
{{- end }}

{{- define "stiefel.sslmode" -}}
{{- if .Values.postgresql.enabled }}disable{{ else }}{{ .Values.database.sslmode }}{{ end -}}
{{- end }}

{{- define "stiefel.databaseSecret" -}}
{{- default (printf "%s-database" (include "stiefel.fullname" .)) .Values.database.existingSecret -}}
{{- end }}

{{- define "stiefel.databasePasswordKey" -}}
{{- if .Values.database.existingSecret }}{{ .Values.database.passwordKey }}{{ else }}password{{ end -}}
{{- end }}

{{- define "stiefel.brokerHost" -}}
{{- if .Values.valkey.enabled -}}
{{- printf "%s-valkey" (include "stiefel.fullname" .) -}}
{{- else -}}
{{- .Values.broker.host -}}
{{- end -}}
{{- end }}

{{- define "stiefel.brokerPort" -}}
{{- if .Values.valkey.enabled }}6379{{ else }}{{ .Values.broker.port }}{{ end -}}
{{- end }}

{{- define "stiefel.brokerSecret" -}}
{{- default (printf "%s-broker" (include "stiefel.fullname" .)) .Values.broker.existingSecret -}}
{{- end }}

{{- define "stiefel.brokerPasswordKey" -}}
{{- if .Values.broker.existingSecret }}{{ .Values.broker.passwordKey }}{{ else }}password{{ end -}}
{{- end }}

{{/* The way to the database. libpq takes the password from PGPASSWORD, so it needs no quoting in a URL; workers keep
     that variable from trainers. Takes (dict "root" $), and as "secret" another Secret with the password. */}}
{{- define "stiefel.databaseEnv" -}}
{{- $database := .root.Values.database -}}
{{- if $database.urlKey -}}
- name: STIEFEL_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ $database.existingSecret }}
      key: {{ $database.urlKey }}
{{- else -}}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ default (include "stiefel.databaseSecret" .root) .secret }}
      key: {{ include "stiefel.databasePasswordKey" .root }}
- name: STIEFEL_DATABASE_URL
  value: postgresql+psycopg://{{ $database.user }}@{{ include "stiefel.databaseHost" .root }}:
    {{- include "stiefel.databasePort" .root }}/{{ $database.name }}?sslmode={{ include "stiefel.sslmode" .root }}
{{- end }}
{{- end }}

{{/* The way to the broker. Its password is a variable of ours, which workers keep from trainers like all of them. */}}
{{- define "stiefel.brokerEnv" -}}
{{- $broker := .Values.broker -}}
{{- if $broker.urlKey -}}
- name: STIEFEL_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ $broker.existingSecret }}
      key: {{ $broker.urlKey }}
{{- else }}
{{- $scheme := ternary "rediss" "redis" $broker.tls }}
{{- $host := include "stiefel.brokerHost" . }}
{{- $address := printf "%s:%s/%d" $host (include "stiefel.brokerPort" .) (int $broker.database) }}
{{- if or $broker.password $broker.existingSecret -}}
- name: STIEFEL_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "stiefel.brokerSecret" . }}
      key: {{ include "stiefel.brokerPasswordKey" . }}
- name: STIEFEL_REDIS_URL
  value: {{ $scheme }}://:$(STIEFEL_REDIS_PASSWORD)@{{ $address }}
{{- else -}}
- name: STIEFEL_REDIS_URL
  value: {{ $scheme }}://{{ $address }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of a pod that must be made again when its settings or a Secret of the chart's change. */}}
{{- define "stiefel.checksums" -}}
checksum/settings: {{ include "stiefel.settings" . | sha256sum }}
{{- if or .Values.database.password .Values.broker.password }}
checksum/secrets: {{ printf "%s %s" .Values.database.password .Values.broker.password | sha256sum | trunc 12 }}
{{- end }}
{{- end }}

{{/* camelCase to STIEFEL_CAMEL_CASE, as data of a ConfigMap. Numbers by toJson: Go prints large ones as 1e+06. */}}
{{- define "stiefel.variables" -}}
{{- range $key, $value := . }}
STIEFEL_{{ $key | snakecase | upper }}: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- end }}

{{/* The settings that all parts share. */}}
{{- define "stiefel.settings" -}}
{{- $readable := .Values.settings.readable }}
{{- range .Values.extraVolumes }}
{{- if dig "readable" true . }}{{ $readable = append $readable .mountPath }}{{ end }}
{{- end }}
{{- if has "*" $readable }}{{ $readable = list "*" }}{{ end }}
{{- $settings := deepCopy .Values.settings }}
{{- $_ := set $settings "readable" (join ":" $readable) }}
{{- $_ := set $settings "writable" (join " " .Values.settings.writable) }}
{{- include "stiefel.variables" $settings }}
{{- end }}
