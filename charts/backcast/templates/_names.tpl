{{/* Names and labels. One helper for each resource's name; no other place builds a name. */}}

{{- define "backcast.chartname" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 35 | trimSuffix "-" }}
{{- end }}

{{/*
At most 35 characters: the longest suffix, `-worker-` and a pool's 20, then fits in the 63 of a label. A name that is
cut ends in a hash of the whole name, so that two long releases stay apart.
*/}}
{{- define "backcast.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $chart := include "backcast.chartname" . }}
{{- $name = contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) }}
{{- end }}
{{- $name = $name | replace "." "-" }}
{{- if gt (len $name) 35 }}
{{- $name = printf "%s-%s" ($name | trunc 28 | trimSuffix "-") (sha256sum $name | trunc 6) }}
{{- end }}
{{- $name | trimSuffix "-" }}
{{- end }}

{{- define "backcast.name.api" -}}{{ include "backcast.fullname" . }}-api{{- end }}
{{- define "backcast.name.metrics" -}}{{ include "backcast.name.api" . }}-metrics{{- end }}
{{- define "backcast.name.dashboard" -}}{{ include "backcast.fullname" .root }}-dashboard-{{ .dashboard }}{{- end }}
{{- define "backcast.name.worker" -}}{{ include "backcast.fullname" .root }}-worker-{{ .pool }}{{- end }}
{{- define "backcast.name.workers" -}}{{ include "backcast.fullname" . }}-worker{{- end }}
{{- define "backcast.name.setups" -}}{{ include "backcast.fullname" . }}-setup{{- end }}
{{- define "backcast.name.tests" -}}{{ include "backcast.fullname" . }}-test{{- end }}
{{- define "backcast.name.steward" -}}{{ include "backcast.fullname" . }}-steward{{- end }}
{{- define "backcast.name.prefect" -}}{{ include "backcast.fullname" . }}-prefect{{- end }}
{{- define "backcast.name.llm" -}}{{ include "backcast.fullname" . }}-llm{{- end }}
{{- define "backcast.name.postgres" -}}{{ include "backcast.fullname" . }}-postgres{{- end }}
{{- define "backcast.name.store" -}}{{ include "backcast.fullname" .root }}-{{ .kind }}{{- end }}
{{- define "backcast.name.config" -}}{{ include "backcast.fullname" . }}{{- end }}
{{- define "backcast.name.secret" -}}{{ include "backcast.fullname" . }}{{- end }}
{{/* Of a cluster-wide object: no namespace and no release's name has a dot, so no two of these are the same. */}}
{{- define "backcast.name.policy" -}}{{ list .Release.Namespace (include "backcast.name.steward" .) | compact | join "." }}{{- end }}
{{- define "backcast.name.test" -}}{{ include "backcast.fullname" .root }}-test-{{ .test }}{{- end }}

{{/* A Job can't be changed, so its name holds everything that may change it. A rollback makes the old one again. */}}
{{- define "backcast.name.setup" -}}
{{ include "backcast.name.setups" . }}-{{ .Release.Revision }}-{{ list .Chart.Version .Chart.AppVersion .Values | toJson | sha256sum | trunc 8 }}
{{- end }}

{{- define "backcast.name.serviceaccount" -}}
{{ .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "backcast.fullname" .) "default") }}
{{- end }}

{{/* The folder of the current template, under templates/; empty for a template outside of the folders. */}}
{{- define "backcast.component" -}}
{{- $path := .Template.Name | trimPrefix .Template.BasePath | trimPrefix "/" | splitList "/" }}
{{- if gt (len $path) 1 }}{{ first $path }}{{ end }}
{{- end }}

{{/* Labels that select pods: of this template's component, or of the one in (dict "root" . "component" …). */}}
{{- define "backcast.selector" -}}
{{- $root := .root | default . -}}
app.kubernetes.io/name: {{ include "backcast.chartname" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with .component | default (include "backcast.component" $root) }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
backcast/pool: {{ . }}
{{- end }}
{{- end }}

{{/* One map of labels: (list (dict "root" . …) OURS (list USERS …) DEFAULTS). Users' labels win over the defaults only. */}}
{{- define "backcast.labels" -}}
{{- $ours := merge (include "backcast.selector" (first .) | fromYaml) (index . 1) }}
{{- $users := deepCopy (first .).root.Values.commonLabels }}
{{- range index . 2 }}{{ $users = mergeOverwrite $users (. | default dict) }}{{ end }}
{{- range $key := keys $ours | sortAlpha }}
{{- if hasKey $users $key }}
{{- fail (printf "The label %s is the chart's own, by which objects are found: give yours another name." $key) }}
{{- end }}
{{- end }}
{{- merge $ours $users (last .) (dict "app.kubernetes.io/part-of" "backcast") | toYaml }}
{{- end }}

{{/* A resource's metadata: (dict "root" . "name" … ["pool" …] ["labels" …] ["annotations" …] ["clusterWide" BOOL]). */}}
{{- define "backcast.metadata" -}}
name: {{ .name }}
{{- if not .clusterWide }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
{{- $chart := printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- $ours := dict "app.kubernetes.io/managed-by" .root.Release.Service "helm.sh/chart" $chart }}
labels:
  {{- include "backcast.labels" (list . $ours (list .labels) (dict "app.kubernetes.io/version" .root.Chart.AppVersion)) | nindent 2 }}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
