{{/* Edges of the NetworkPolicies. Ports are numbers: a name that no container declares lets nothing through. */}}

{{/* Pods of this release, by component: (dict "root" . "components" (list …)). */}}
{{- define "backcast.peer" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ include "backcast.chartname" .root }}
      app.kubernetes.io/instance: {{ .root.Release.Name }}
    {{- with .components }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: {{ toJson . }}}
    {{- end }}
{{- end }}

{{- define "backcast.peer.namespace" -}}
- namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ . }}}
{{- end }}

{{/* The head of a component's policy; its edges follow: (dict "root" . "name" …). */}}
{{- define "backcast.networkpolicy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "backcast.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "backcast.selector" .root | nindent 6 }}
  policyTypes: [Ingress, Egress]
{{- end }}

{{/* From Prometheus, which reads /metrics: (list ROOT PORT). */}}
{{- define "backcast.from.monitoring" -}}
{{- with (first .).Values.networkPolicy.monitoringNamespace }}
- ports: [{port: {{ index $ 1 }}}]
  from:
    {{- include "backcast.peer.namespace" . | nindent 4 }}
{{- end }}
{{- end }}

{{/* From components of this release: (list ROOT PORT COMPONENT …). */}}
{{- define "backcast.from" -}}
- ports: [{port: {{ index . 1 }}}]
  from:
    {{- include "backcast.peer" (dict "root" (first .) "components" (slice . 2)) | nindent 4 }}
{{- end }}

{{/* To a component of this release: (list ROOT PORT COMPONENT). */}}
{{- define "backcast.to" -}}
- ports: [{port: {{ index . 1 }}}]
  to:
    {{- include "backcast.peer" (dict "root" (first .) "components" (slice . 2)) | nindent 4 }}
{{- end }}

{{- define "backcast.to.postgres" -}}
{{- if eq .Values.postgres.mode "bundled" }}
{{- include "backcast.to" (list . 5432 "postgres") }}
{{- else -}}
- ports: [{port: {{ .Values.postgres.external.port }}}]
{{- end }}
{{- end }}

{{/* To the store and its fallback. */}}
{{- define "backcast.to.store" -}}
{{- range include "backcast.stores" . | fromYamlArray }}
{{- if eq .mode "bundled" }}
{{ include "backcast.to" (list $ (include "backcast.store.port" .kind) "store") }}
{{- else }}
- ports: [{port: {{ include "backcast.port" (.external.endpoint | default "https://aws") }}}]
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.to.prefect" -}}
{{- if eq .Values.prefectServer.mode "bundled" }}
{{- include "backcast.to" (list . 4200 "prefect-server") }}
{{- else if eq .Values.prefectServer.mode "external" -}}
- ports: [{port: {{ include "backcast.port" .Values.prefectServer.external.apiUrl }}}]
{{- end }}
{{- end }}

{{/* To everywhere but the blocked addresses: (dict "root" . ["ports" …]). */}}
{{- define "backcast.to.outside" -}}
- to:
    {{- range $all := list "0.0.0.0/0" "::/0" }}
    - ipBlock:
        cidr: {{ $all }}
        {{- $blocked := list }}
        {{- range $.root.Values.networkPolicy.blockedCidrs }}
        {{- if eq (contains ":" .) (contains ":" $all) }}{{ $blocked = append $blocked . }}{{ end }}
        {{- end }}
        {{- with $blocked }}
        except: {{ toJson . }}
        {{- end }}
    {{- end }}
  {{- with .ports }}
  ports: {{ toJson . }}
  {{- end }}
{{- end }}
