{{/* The common parts of pods. Each helper gets (dict "root" . "part" VALUES …). */}}

{{/* Labels and annotations. A pod rolls when its Secrets' values change, and with "config" true its ConfigMap. */}}
{{- define "backcast.pod.metadata" -}}
labels:
  {{- include "backcast.labels" (list . dict (list .root.Values.podLabels .part.podLabels) dict) | nindent 2 }}
{{- $annotations := mergeOverwrite (deepCopy .root.Values.commonAnnotations) .root.Values.podAnnotations (.part.podAnnotations | default dict) }}
{{- if .config }}
{{- $_ := set $annotations "checksum/config" (include "backcast.config.read" .  | toJson | sha256sum) }}
{{- end }}
{{- $env := include "backcast.env" . }}
{{- $read := dict }}
{{- range $key, $value := include "backcast.secret.given" .root | fromYaml }}
{{- if contains (printf "key: %s" $key) $env }}{{ $_ := set $read $key $value }}{{ end }}
{{- end }}
{{- if $read }}
{{- $_ := set $annotations "checksum/secret" (toJson $read | sha256sum) }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The settings that the pods of a component read. Those of all processes are not in a section. */}}
{{- define "backcast.config.read" -}}
{{- $config := include "backcast.config" .root | fromYaml }}
{{- $sections := dict "api" (list "api" "store") "worker" (list "worker" "store" "model" "prefect") "steward" (list "steward" "store" "prefect")
  "llm" (list "model") }}
{{- $mine := append (get $sections (include "backcast.component" .root) | default list) "database" }}
{{- range $name := list "api" "worker" "steward" "store" "model" "prefect" "setup" }}
{{- if not (has $name $mine) }}{{ $_ := unset $config $name }}{{ end }}
{{- end }}
{{- toJson $config }}
{{- end }}

{{/* A pod's spec without containers and volumes: "uid" NUMBER, and "account" NAME for the one pod with a token. */}}
{{- define "backcast.pod.spec" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ .account | default (include "backcast.name.serviceaccount" .root) }}
automountServiceAccountToken: {{ not (empty .account) }}
enableServiceLinks: false  # their variables can look like settings, and grow with the namespace
securityContext:
  runAsNonRoot: true
  {{- if $values.podSecurity.setUser }}
  runAsUser: {{ .uid }}
  runAsGroup: {{ .uid }}
  fsGroup: {{ .uid }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - {{ kindIs "map" . | ternary . (dict "name" .) | toJson }}
  {{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" }}
{{- with index $.part $key | default (index $values $key) }}
{{ dict $key . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{/* Over zones and nodes, where possible: with DoNotSchedule, a drain and a disruption budget wait for each other. */}}
{{- define "backcast.pod.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "backcast.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{/* A container's image, rights, resources and environment: "image" its image, "env" its concerns. */}}
{{- define "backcast.container" -}}
image: {{ include "backcast.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
resources:
  {{- toYaml .part.resources | nindent 2 }}
env:
  {{- include "backcast.env" . | trim | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- if .config }}
  - {name: config, mountPath: /etc/backcast, readOnly: true}
  {{- if include "backcast.uses.ca" .root }}
  - {name: ca, mountPath: /etc/backcast-ca, readOnly: true}
  {{- end }}
  {{- end }}
  {{- with .mounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with concat .root.Values.extraVolumeMounts (.part.extraVolumeMounts | default list) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "backcast.pod.volumes" -}}
volumes:
  - {name: tmp, emptyDir: {}}
  {{- if .config }}
  - name: config
    configMap: {name: {{ include "backcast.name.config" .root }}}
  {{- if include "backcast.uses.ca" .root }}
  - name: ca
    configMap:
      name: {{ .root.Values.store.external.caBundle.configMap }}
      items: [{key: {{ .root.Values.store.external.caBundle.key }}, path: ca.crt}]
  {{- end }}
  {{- end }}
  {{- with .volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with concat .root.Values.extraVolumes (.part.extraVolumes | default list) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "backcast.uses.ca" -}}
{{- with .Values.store }}{{ if and (eq .mode "external") .external.caBundle.configMap }}true{{ end }}{{ end }}
{{- end }}

{{/* HTTP probes of a port: (dict "port" NUMBER "live" PATH "ready" PATH). Five seconds, for nodes that are busy. */}}
{{- define "backcast.probes" -}}
startupProbe:
  httpGet: {path: {{ .live }}, port: {{ .port }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 90
livenessProbe:
  httpGet: {path: {{ .live }}, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: {{ .ready }}, port: {{ .port }}}
  periodSeconds: 3
  timeoutSeconds: 5
{{- end }}
