{{/* Replicas, their scalers, and disruption budgets. */}}

{{/*
The line `replicas`: (dict "root" . "name" … "part" … "scaled" BOOL). Under a scaler it is the number that runs now:
without the line, the upgrade that turns the scaler on would ask for 1. It is at least minReplicas, since no HPA starts
from 0.
*/}}
{{- define "backcast.replicas" -}}
{{- if not .scaled -}}
replicas: {{ .part.replicas }}
{{- else }}
{{- with lookup "apps/v1" "Deployment" .root.Release.Namespace .name -}}
replicas: {{ max (int .spec.replicas) (int $.part.autoscaling.minReplicas) }}
{{- end }}
{{- end }}
{{- end }}

{{/* By CPU: (dict "root" . "name" … "part" … ["pool" …]). */}}
{{- define "backcast.hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "backcast.metadata" . | nindent 2 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ .name }}}
  {{- with .part.autoscaling }}
  minReplicas: {{ .minReplicas }}
  maxReplicas: {{ .maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .targetCPUUtilizationPercentage }}}
  {{- if hasKey . "stabilizationSeconds" }}
  behavior:
    scaleDown: {stabilizationWindowSeconds: {{ .stabilizationSeconds }}}
  {{- end }}
  {{- end }}
{{- end }}

{{/*
A disruption budget: (dict "root" . "name" … "part" … ["pool" …] ["scaled" BOOL]). None for a single pod:
maxUnavailable would have no effect, and minAvailable would keep its node from being drained.
*/}}
{{- define "backcast.pdb" -}}
{{- $most := .part.replicas }}
{{- if .scaled }}{{ $most = .part.autoscaling.maxReplicas }}{{ end }}
{{- if and .part.pdb.enabled (gt (int $most) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "backcast.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "backcast.selector" . | nindent 6 }}
{{- end }}
{{- end }}
