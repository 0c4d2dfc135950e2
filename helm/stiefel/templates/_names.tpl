{{/* What begins every name: short enough for "-worker-POOL" and what Kubernetes adds to a pod's name. */}}
{{- define "stiefel.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 28 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 28 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 28 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Of every object. Takes (dict "root" $ "component" "api"). */}}
{{- define "stiefel.labels" -}}
{{ include "stiefel.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: stiefel
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of pods, and what finds them: nothing that changes with a version, since a selector may not, and since a pod whose
     labels change is made again. */}}
{{- define "stiefel.selector" -}}
{{ include "stiefel.release" .root }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
stiefel-pool: {{ . }}
{{- end }}
{{- end }}

{{/* Of all pods of the release. */}}
{{- define "stiefel.release" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Takes (dict "root" $ "image" .Values.image.api). Ours have the registry before them. */}}
{{- define "stiefel.image" -}}
{{- $image := .image -}}
{{- with .root.Values.image.registry }}{{ . | trimSuffix "/" }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{/* A pool with what it does not say. Takes (dict "root" $ "pool" $pool); gives YAML. */}}
{{- define "stiefel.pool" -}}
{{- $merged := deepCopy .root.Values.workerDefaults -}}
{{- range $key, $value := .pool }}{{ $_ := set $merged $key $value }}{{ end -}}
{{- toYaml $merged -}}
{{- end }}

{{- define "stiefel.serviceAccountName" -}}
{{- $account := .Values.serviceAccount -}}
{{- default (ternary (include "stiefel.fullname" .) "default" $account.create) $account.name -}}
{{- end }}

{{- define "stiefel.runsClaim" -}}
{{- default (printf "%s-runs" (include "stiefel.fullname" .)) .Values.runs.existingClaim -}}
{{- end }}
