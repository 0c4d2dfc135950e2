{{/* A worker's pod, of a Deployment or of a ScaledJob. Takes (dict "root" $ "pool" $merged). */}}
{{- define "stiefel.workerPod" -}}
{{- $labels := dict "root" .root "component" "worker" "pool" .pool.name -}}
metadata:
  labels:
    {{- include "stiefel.selector" $labels | nindent 4 }}
  annotations:
    {{- include "stiefel.checksums" .root | nindent 4 }}
    {{- with .pool.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "stiefel.pod" (dict "root" .root "at" .pool "user" 10001) | nindent 2 }}
  serviceAccountName: {{ include "stiefel.serviceAccountName" .root }}
  terminationGracePeriodSeconds: {{ .pool.terminationGracePeriodSeconds }}
  {{- with .pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .pool.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .pool.scaling "keda" }}
  restartPolicy: Never
  {{- end }}
  containers:
    - name: worker
      {{- $image := default .root.Values.image.trainer .pool.image }}
      image: {{ include "stiefel.image" (dict "root" .root "image" $image) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- include "stiefel.container" . | nindent 6 }}
      args: [python, -m, worker{{ if eq .pool.scaling "keda" }}, --once{{ end }}]
      envFrom:
        - configMapRef:
            name: {{ include "stiefel.fullname" .root }}-settings
      env:
        {{- include "stiefel.databaseEnv" (dict "root" .root) | nindent 8 }}
        {{- include "stiefel.brokerEnv" .root | nindent 8 }}
        - name: STIEFEL_HOME
          value: /var/lib/stiefel
        # What the probes look at, below /tmp.
        - name: STIEFEL_ALIVE_FILE
          value: /tmp/stiefel-worker-alive
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        # With the pool before it: that is how KEDA's question knows whose a running job is.
        - name: STIEFEL_WORKER
          value: {{ .pool.name }}:$(POD_NAME)
        {{- if gt (int .pool.gpus) 0 }}
        # As the container numbers them. What the driver lists may be all of the node.
        - name: STIEFEL_GPUS
          value: {{ untilStep 0 (int .pool.gpus) 1 | join "," | quote }}
        {{- else }}
        - name: STIEFEL_GPUS
          value: none
        - name: STIEFEL_CPU_SLOTS
          value: {{ .pool.cpuSlots | quote }}
        {{- end }}
        {{- with include "stiefel.s3Env" .root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with .root.Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with .pool.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      # By the age of a file that the worker touches: not by a question to the database, which may be away while
      # training goes on.
      startupProbe:
        {{- include "stiefel.workerAlive" . | nindent 8 }}
        periodSeconds: 5
        failureThreshold: 60
      livenessProbe:
        {{- include "stiefel.workerAlive" . | nindent 8 }}
        periodSeconds: 30
        failureThreshold: 4
      readinessProbe:
        {{- include "stiefel.workerAlive" . | nindent 8 }}
        periodSeconds: 30
        failureThreshold: 2
      resources:
        requests:
          {{- toYaml .pool.resources.requests | nindent 10 }}
          {{- with include "stiefel.gpus" .pool | trim }}
          {{- . | nindent 10 }}
          {{- end }}
        limits:
          {{- toYaml .pool.resources.limits | nindent 10 }}
          {{- with include "stiefel.gpus" .pool | trim }}
          {{- . | nindent 10 }}
          {{- end }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        - name: runs
          mountPath: /var/lib/stiefel
        {{- with include "stiefel.extraMounts" .root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ .pool.tmpSize }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .pool.shmSize }}
    {{- include "stiefel.runsVolume" .root | nindent 4 }}
    {{- with include "stiefel.extraVolumes" .root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "stiefel.workerAlive" -}}
exec:
  command: [python, -m, worker.alive]
# Starting Python on a busy machine takes seconds.
timeoutSeconds: 15
{{- end }}

{{- define "stiefel.gpus" -}}
{{- if gt (int .gpus) 0 -}}
{{ .gpuResource }}: {{ .gpus }}
{{- end -}}
{{- end }}

{{/* By the names that every S3 client knows. */}}
{{- define "stiefel.s3Env" -}}
{{- with .Values.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.accessKeyIdKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretAccessKeyKey }}
{{- end }}
{{- with .Values.s3.region }}
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.endpointUrl }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- end }}
