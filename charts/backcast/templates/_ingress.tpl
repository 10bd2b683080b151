{{/* An Ingress in front of a Service of the same name: (dict "root" . "ingress" VALUES "name" … "port" …). */}}
{{- define "backcast.ingress" -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  {{- include "backcast.metadata" (dict "root" .root "name" .name "annotations" .ingress.annotations) | nindent 2 }}
spec:
  {{- with .ingress.className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- if .ingress.tls.enabled }}
  tls:
    - hosts: {{ prepend (.ingress.hosts | default list) .ingress.host | compact | uniq | toJson }}
      secretName: {{ .ingress.tls.secretName | default (printf "%s-tls" .name) }}
  {{- end }}
  rules:
    {{- range prepend (.ingress.hosts | default list | compact) .ingress.host | uniq }}
    {{- if or . (not $.ingress.hosts) }}
    - http:
        paths:
          - path: {{ $.ingress.path | default "/" }}
            pathType: Prefix
            backend: {service: {name: {{ $.name }}, port: {number: {{ $.port }}}}}
      {{- with . }}
      host: {{ . | quote }}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end }}
