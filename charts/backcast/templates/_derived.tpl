{{/* Values that are derived from others: decided here once, used everywhere. A yes is "true", a no is empty. */}}

{{- define "backcast.image" -}}
{{- $values := .root.Values }}
{{- $registry := $values.global.imageRegistry | default .image.registry | default $values.image.registry }}
{{- printf "%s/%s" (trimSuffix "/" $registry) .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default $values.image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* The pools by name, each with its defaults filled in, as YAML. */}}
{{- define "backcast.pools" -}}
{{- $pools := dict }}
{{- range $name, $pool := .Values.workers.pools }}
{{- $_ := set $pools $name (mergeOverwrite (deepCopy $.Values.workers.defaults) ($pool | default dict)) }}
{{- end }}
{{- toYaml $pools }}
{{- end }}

{{/* The name of the pool that serves the built-in task. */}}
{{- define "backcast.pool.builtin" -}}
{{- range $name, $pool := include "backcast.pools" . | fromYaml }}{{ if $pool.builtinTasks }}{{ $name }}{{ end }}{{ end }}
{{- end }}

{{- define "backcast.uses.provider" -}}
{{- with .Values.model }}{{ if or .apiKey .baseUrl .existingSecret }}true{{ end }}{{ end }}
{{- end }}

{{- define "backcast.model.backend" -}}
{{- if ne .Values.model.backend "auto" }}{{ .Values.model.backend }}
{{- else }}{{ include "backcast.uses.provider" . | empty | ternary "embedded" "openai" }}{{ end }}
{{- end }}

{{- define "backcast.uses.llm" -}}
{{- $embedded := eq (include "backcast.model.backend" .) "embedded" }}
{{- if or (eq .Values.llm.mode "on") (and (eq .Values.llm.mode "auto") $embedded) }}true{{ end }}
{{- end }}

{{- define "backcast.uses.keda" -}}
{{- range include "backcast.pools" . | fromYaml }}{{ if eq .autoscaling.mode "keda" }}true{{ end }}{{ end }}
{{- end }}

{{/* Whether api, worker and steward have a database role each. */}}
{{- define "backcast.uses.roles" -}}
{{- with .Values.postgres }}{{ if or (eq .mode "bundled") .external.rolePerPart .external.apiUrl }}true{{ end }}{{ end }}
{{- end }}

{{/* Kubernetes has such policies since 1.30, the oldest that this chart takes. */}}
{{- define "backcast.uses.policy" -}}
{{- with .Values.rbac }}{{ if and .create .admissionPolicy }}true{{ end }}{{ end }}
{{- end }}

{{/* Whether a kind of object is used that not every cluster has: (dict "root" . "api" "group/version/Kind" "mode" MODE). */}}
{{- define "backcast.uses.api" -}}
{{- if or (eq .mode "on") (and (eq .mode "auto") (.root.Capabilities.APIVersions.Has .api)) }}true{{ end }}
{{- end }}

{{/* The port of a bundled server, by its kind. */}}
{{- define "backcast.store.port" -}}{{ eq . "minio" | ternary 9000 8333 }}{{- end }}

{{/* The store and its fallback, as far as they are used: a list of (dict "mode" … "kind" … "external" VALUES), as YAML. */}}
{{- define "backcast.stores" -}}
{{- with .Values.store }}
{{- $stores := list (dict "mode" .mode "kind" .bundled.kind "external" .external) }}
{{- if ne .fallback.mode "off" }}
{{- $stores = append $stores (dict "mode" .fallback.mode "kind" .fallback.kind "external" .fallback.external) }}
{{- end }}
{{- toYaml $stores }}
{{- end }}
{{- end }}

{{/* Where one of them is, in the words of the settings: (dict "root" . "store" …). */}}
{{- define "backcast.store.place" -}}
{{- if eq .store.mode "bundled" }}
{{- $name := include "backcast.name.store" (dict "root" .root "kind" .store.kind) }}
url: s3://{{ .root.Values.store.bundled.bucket }}
endpoint: http://{{ $name }}:{{ include "backcast.store.port" .store.kind }}
{{- else }}
{{- with .store.external }}
url: s3://{{ list .bucket .prefix | compact | join "/" }}
path_style: {{ .pathStyle }}
{{- if .endpoint }}
endpoint: {{ .endpoint }}
{{- end }}
{{- if .region }}
region: {{ .region }}
{{- end }}
{{- if (.caBundle | default dict).configMap }}
ca_bundle: /etc/backcast-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The port of a URL. */}}
{{- define "backcast.port" -}}
{{- $url := urlParse . }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- $port | default (eq $url.scheme "http" | ternary "80" "443") }}
{{- end }}

{{/* The ports of an external PostgreSQL: those in the URLs, or the one of the URLs in a Secret, as YAML. */}}
{{- define "backcast.postgres.ports" -}}
{{- $ports := list }}
{{- with .Values.postgres.external }}
{{- range list .url .prefectUrl .adminUrl .apiUrl .workerUrl .stewardUrl | compact }}
{{- range regexReplaceAll "^[^/]*//([^/@]*@)?([^/?]*).*$" . "${2}" | splitList "," }}
{{- $ports = append $ports (regexFind ":[0-9]+$" . | trimPrefix ":" | default "5432" | int) }}
{{- end }}
{{- end }}
{{- $ports | default (list (int .port)) | uniq | toYaml }}
{{- end }}
{{- end }}

{{/* Without keys the API answers only for its own hosts: those of its Service and its Ingress. An Ingress without a host,
and a load balancer, have a name that is not known here: then for any. */}}
{{- define "backcast.api.hosts" -}}
{{- $hosts := list }}
{{- if not .Values.auth.enabled }}
{{- $service := printf "%s.%s" (include "backcast.name.api" .) .Release.Namespace }}
{{- $hosts = list $service (printf "%s.svc" $service) (printf "%s.svc.cluster.local" $service) }}
{{- with .Values.ingress }}
{{- $its := prepend .hosts .host | compact }}
{{- if .enabled }}{{ $hosts = empty $its | ternary (list "*") (concat $hosts $its) }}{{ end }}
{{- end }}
{{- if eq .Values.api.service.type "LoadBalancer" }}{{ $hosts = list "*" }}{{ end }}
{{- end }}
{{- toJson $hosts }}
{{- end }}

{{/* Address at which browsers reach Prefect's pages; empty if it is not known. */}}
{{- define "backcast.prefect.ui" -}}
{{- with .Values.prefectServer }}
{{- if .publicUrl }}{{ .publicUrl }}
{{- else if .ingress.enabled }}{{ .ingress.tls.enabled | ternary "https" "http" }}://{{ .ingress.host }}
{{- end }}
{{- end }}
{{- end }}

{{/* backcast.yaml: the settings that are derived from the values, overridden by the user's `config`. */}}
{{- define "backcast.config" -}}
{{- $values := .Values }}
{{- $stores := include "backcast.stores" . | fromYamlArray }}
{{- $store := include "backcast.store.place" (dict "root" . "store" (first $stores)) | fromYaml }}
{{- range rest $stores }}{{ $_ := set $store "fallback" (merge (dict "create" (eq .mode "bundled")) (include "backcast.store.place" (dict "root" $ "store" .) | fromYaml)) }}{{ end }}
{{- with $values.store.publicEndpoint }}{{ $_ := set $store "public_endpoint" . }}{{ end }}
{{- $model := dict "backend" (include "backcast.model.backend" .) "name" $values.model.name "host" $values.listen }}
{{- if and (eq $model.backend "embedded") (include "backcast.uses.llm" .) }}
{{- $_ := set $model "base_url" (printf "http://%s:8083/v1" (include "backcast.name.llm" .)) }}
{{- else if $values.model.baseUrl }}
{{- $_ := set $model "base_url" $values.model.baseUrl }}
{{- end }}
{{- $prefect := dict "api_url" nil "history" false }}
{{- $steward := dict "host" $values.listen "deletion_cost" $values.rbac.create }}
{{- if eq $values.prefectServer.mode "bundled" }}
{{- $_ := set $steward "keep_history" "P30D" }}
{{- $prefect = dict "api_url" (printf "http://%s:4200/api" (include "backcast.name.prefect" .)) }}
{{- else if eq $values.prefectServer.mode "external" }}
{{- $prefect = dict "api_url" $values.prefectServer.external.apiUrl }}
{{- end }}
{{- $api := dict "host" $values.listen "metrics_host" $values.listen "prefix" (and .Values.ingress.enabled .Values.ingress.path | default "" | trimSuffix "/") "allowed_hosts" (include "backcast.api.hosts" . | fromJsonArray) }}
{{- with include "backcast.prefect.ui" . }}{{ $_ := set $api "prefect_ui" . }}{{ end }}
{{- $derived := dict
  "api" $api
  "worker" (dict "host" $values.listen)
  "steward" $steward
  "store" $store
  "model" $model
  "prefect" $prefect }}
{{- mergeOverwrite $derived (deepCopy $values.config) | toYaml }}
{{- end }}
