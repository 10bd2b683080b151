{{/* The volume of a bundled server: (dict "root" . "part" VALUES). */}}
{{- define "backcast.claim" -}}
volumeClaimTemplates:
  - metadata:
      name: data
      labels:
        {{- include "backcast.selector" .root | nindent 8 }}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .part.storage.storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources: {requests: {storage: {{ .part.storage.size }}}}
{{- end }}
