{{/* What a schema cannot say: keys that need, or contradict, one another. Each message names the key first. */}}
{{- define "stiefel.checks" -}}
{{- include "stiefel.checks.database" . }}
{{- include "stiefel.checks.broker" . }}
{{- include "stiefel.checks.api" . }}
{{- include "stiefel.checks.volumes" . }}
{{- include "stiefel.checks.workers" . }}
{{- include "stiefel.checks.settings" . }}
{{- include "stiefel.checks.generator" . }}
{{- end }}

{{- define "stiefel.checks.generator" -}}
{{- $generator := .Values.generator }}
{{- if and $generator.enabled (not $generator.existingSecret) }}
{{- fail "generator.existingSecret: say which Secret has what the generator and the API share" }}
{{- end }}
{{- if and $generator.enabled (eq .Values.runs.type "emptyDir") }}
{{- fail "generator.enabled: with runs.type emptyDir it would find no runs; use a claim" }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.settings" -}}
{{- $settings := .Values.settings }}
{{- if lt (float64 $settings.leaseSeconds) (mulf 3 $settings.beatSeconds) }}
{{- fail "settings.leaseSeconds: make it three times settings.beatSeconds at least, or one late beat ends a training" }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.database" -}}
{{- $database := .Values.database }}
{{- if and .Values.postgresql.enabled (or $database.host $database.urlKey) }}
{{- fail "database.host, database.urlKey: leave them empty with postgresql.enabled, or set that to false" }}
{{- end }}
{{- if not (or .Values.postgresql.enabled $database.host $database.urlKey) }}
{{- fail "database.host: say where PostgreSQL is (or database.urlKey, or set postgresql.enabled to try things out)" }}
{{- end }}
{{- if and $database.urlKey (not $database.existingSecret) }}
{{- fail "database.existingSecret: say in which Secret database.urlKey is" }}
{{- end }}
{{- if and $database.password $database.existingSecret }}
{{- fail "database.password: the password is in database.existingSecret; give one of them" }}
{{- end }}
{{- if not (or $database.password $database.existingSecret) }}
{{- fail "database.existingSecret: say which Secret has PostgreSQL's password (or give database.password)" }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.broker" -}}
{{- $broker := .Values.broker }}
{{- if and .Values.valkey.enabled (or $broker.host $broker.urlKey $broker.tls) }}
{{- fail "broker.host, broker.urlKey, broker.tls: leave them empty with valkey.enabled, or set that to false" }}
{{- end }}
{{- if not (or .Values.valkey.enabled $broker.host $broker.urlKey) }}
{{- fail "broker.host: say where Redis or Valkey is (or broker.urlKey, or set valkey.enabled)" }}
{{- end }}
{{- if and $broker.urlKey (not $broker.existingSecret) }}
{{- fail "broker.existingSecret: say in which Secret broker.urlKey is" }}
{{- end }}
{{- if and $broker.password $broker.existingSecret }}
{{- fail "broker.password: the password is in broker.existingSecret; give one of them" }}
{{- end }}
{{- if and .Values.valkey.enabled (not (or $broker.password $broker.existingSecret)) }}
{{- fail "broker.existingSecret: say which Secret has the password for Valkey (or give broker.password)" }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.api" -}}
{{- $ingress := .Values.api.ingress }}
{{- if and $ingress.enabled (not $ingress.host) }}
{{- fail "api.ingress.host: say by which name the API is asked for" }}
{{- end }}
{{- if and $ingress.enabled $ingress.tls.enabled (not $ingress.tls.secretName) }}
{{- fail "api.ingress.tls.secretName: say which Secret has the certificate (API keys travel in every request)" }}
{{- end }}
{{- $scaling := .Values.api.autoscaling }}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) }}
{{- fail "api.autoscaling.minReplicas: it is above api.autoscaling.maxReplicas" }}
{{- end }}
{{- $monitor := .Values.metrics.serviceMonitor }}
{{- if and $monitor.enabled (not .Values.api.settings.openMetrics) (not $monitor.apiKeySecret) }}
{{- fail (print "metrics.serviceMonitor.apiKeySecret: the API's metrics ask for an API key; "
    "say which Secret has one of scope read, or set api.settings.openMetrics") }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.volumes" -}}
{{- $store := false }}
{{- range .Values.settings.writable }}
{{- if or (contains "://" .) (eq . "*") }}{{ $store = true }}{{ end }}
{{- end }}
{{- if and (eq .Values.runs.type "emptyDir") (not $store) }}
{{- fail (print "settings.writable: with runs.type emptyDir checkpoints must go elsewhere; "
    "allow a place such as s3://bucket/runs") }}
{{- end }}
{{- if and (eq .Values.runs.type "emptyDir") .Values.runs.existingClaim }}
{{- fail "runs.existingClaim: it is not used with runs.type emptyDir" }}
{{- end }}
{{- $names := list "runs" "tmp" "shm" }}
{{- $paths := list "/var/lib/stiefel" "/tmp" "/dev/shm" }}
{{- range .Values.extraVolumes }}
{{- if has .name $names }}{{ fail (printf "extraVolumes: there is another volume called %s" .name) }}{{ end }}
{{- if has .mountPath $paths }}{{ fail (printf "extraVolumes: there is another volume at %s" .mountPath) }}{{ end }}
{{- $names = append $names .name }}
{{- $paths = append $paths .mountPath }}
{{- end }}
{{- end }}

{{- define "stiefel.checks.workers" -}}
{{- $seen := dict }}
{{- range $given := .Values.workers }}
{{- $pool := include "stiefel.pool" (dict "root" $ "pool" $given) | fromYaml }}
{{- if hasKey $seen $pool.name }}{{ fail (printf "workers: there are two pools called %s" $pool.name) }}{{ end }}
{{- $_ := set $seen $pool.name true }}
{{- $least := add 30 (ceil $.Values.settings.graceSeconds) }}
{{- $grace := int $pool.terminationGracePeriodSeconds }}
{{- if lt $grace (int $least) }}
{{- $why := printf "%d would cut checkpoints short; at least %d, 30 above settings.graceSeconds" $grace (int $least) }}
{{- fail (printf "workers[%s].terminationGracePeriodSeconds: %s" $pool.name $why) }}
{{- end }}
{{- if and (eq $pool.scaling "keda") (hasKey $given "replicas") }}
{{- fail (printf "workers[%s].replicas: with scaling keda say maxReplicas" $pool.name) }}
{{- end }}
{{- if and (eq $pool.scaling "deployment") (hasKey $given "maxReplicas") }}
{{- fail (printf "workers[%s].maxReplicas: with scaling deployment say replicas" $pool.name) }}
{{- end }}
{{- if and (gt (int $pool.gpus) 0) (hasKey $given "cpuSlots") }}
{{- fail (printf "workers[%s].cpuSlots: of a worker without GPUs; set gpus to 0" $pool.name) }}
{{- end }}
{{- if and (eq $pool.scaling "keda") $.Values.database.urlKey (not $.Values.keda.existingSecret) }}
{{- fail (printf (print "keda.existingSecret: workers[%s] is scaled by KEDA, which cannot read database.urlKey; "
    "say which Secret has the URL as postgresql://") $pool.name) }}
{{- end }}
{{- /* Kubernetes may refuse a list that names one twice, or take the last. */}}
{{- $variables := include "stiefel.s3Env" $ | fromYamlArray }}
{{- range concat $.Values.extraEnv $pool.env }}
{{- $name := .name }}
{{- range $variables }}
{{- if eq .name $name }}
{{- fail (printf "workers[%s].env: %s is set twice, here and in extraEnv or s3" $pool.name $name) }}
{{- end }}
{{- end }}
{{- $variables = append $variables . }}
{{- end }}
{{- range $name := list "limits" "requests" }}
{{- if hasKey (get $pool.resources $name | default dict) $pool.gpuResource }}
{{- fail (printf "workers[%s].resources.%s: say how many GPUs by gpus" $pool.name $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
