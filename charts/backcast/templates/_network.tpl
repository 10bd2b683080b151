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
{{- range include "backcast.postgres.ports" . | fromYamlArray }}
{{ include "backcast.to.port" (list $ .) }}
{{- end }}
{{- end }}
{{- end }}

{{/* To the store and its fallback. */}}
{{- define "backcast.to.store" -}}
{{- range include "backcast.stores" . | fromYamlArray }}
{{- if eq .mode "bundled" }}
{{ include "backcast.to" (list $ (include "backcast.store.port" .kind) "store") }}
{{- else }}
{{ include "backcast.to.port" (list $ (include "backcast.port" (.external.endpoint | default "https://aws"))) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.to.prefect" -}}
{{- if eq .Values.prefectServer.mode "bundled" }}
{{- include "backcast.to" (list . 4200 "prefect-server") }}
{{- else if eq .Values.prefectServer.mode "external" -}}
{{- include "backcast.to.port" (list . (include "backcast.port" .Values.prefectServer.external.apiUrl)) }}
{{- end }}
{{- end }}

{{- define "backcast.to.model" -}}
{{- if include "backcast.uses.llm" . }}
{{- include "backcast.to" (list . 8083 "llm") }}
{{- else if eq (include "backcast.model.backend" .) "openai" -}}
{{- include "backcast.to.port" (list . (include "backcast.port" (.Values.model.baseUrl | default "https://openai"))) }}
{{- end }}
{{- end }}

{{/* To a server outside of the release, whose address is unknown here: (list ROOT PORT). It may be in a blocked network, so
only the link-local addresses stay blocked, where no such server is and clouds serve credentials. */}}
{{- define "backcast.to.port" -}}
{{- $link := list }}
{{- range (first .).Values.networkPolicy.blockedCidrs }}{{ if regexMatch "^(169\\.254\\.|fe80:|fd00:ec2:|fd20:ce:)" . }}{{ $link = append $link . }}{{ end }}{{ end }}
{{- include "backcast.to.all" (dict "blocked" $link "ports" (list (dict "port" (index . 1 | int)))) }}
{{- end }}

{{/* To everywhere but some addresses: (dict "blocked" (list CIDR …) ["ports" …]). */}}
{{- define "backcast.to.all" -}}
- to:
    {{- range $all := list "0.0.0.0/0" "::/0" }}
    - ipBlock:
        cidr: {{ $all }}
        {{- $blocked := list }}
        {{- range $.blocked }}
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
