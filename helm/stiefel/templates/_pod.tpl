{{/* What every pod has: who it runs as, no token, no variables named after services (STIEFEL_… among them).
     Takes (dict "root" $ "at" .Values.api "user" 10001). */}}
{{- define "stiefel.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  # Else every start would look at each file of a large volume.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .at.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .at.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Of every container. */}}
{{- define "stiefel.container" -}}
securityContext:
  runAsNonRoot: true
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* Where run directories are. */}}
{{- define "stiefel.runsVolume" -}}
- name: runs
  {{- if eq .Values.runs.type "claim" }}
  persistentVolumeClaim:
    claimName: {{ include "stiefel.runsClaim" . }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.runs.size }}
  {{- end }}
{{- end }}

{{/* The operator's own volumes, of all our pods: a certificate of the database's is needed by each. */}}
{{- define "stiefel.extraVolumes" -}}
{{- range .Values.extraVolumes }}
- name: {{ .name }}
  {{- toYaml .volume | nindent 2 }}
{{- end }}
{{- end }}

{{- define "stiefel.extraMounts" -}}
{{- range .Values.extraVolumes }}
- name: {{ .name }}
  mountPath: {{ .mountPath }}
  readOnly: {{ dig "readOnly" true . }}
{{- end }}
{{- end }}

{{/* With the database in the release there is none to migrate before its pods are made, and a hook after them would
     wait in vain under --wait, for an API that is ready once the schema is there. So API and reaper bring it themselves
     then, before they start; again and at once is harmless. */}}
{{- define "stiefel.migrate" -}}
{{- if .Values.postgresql.enabled }}
initContainers:
  - name: migrate
    image: {{ include "stiefel.image" (dict "root" . "image" .Values.image.api) }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    {{- include "stiefel.container" . | nindent 4 }}
    args: [python, -m, migrations]
    env:
      {{- include "stiefel.databaseEnv" (dict "root" .) | nindent 6 }}
      {{- with .Values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources:
      {{- toYaml .Values.migrations.resources | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- with include "stiefel.extraMounts" . | trim }}
      {{- . | nindent 6 }}
      {{- end }}
{{- end }}
{{- end }}
