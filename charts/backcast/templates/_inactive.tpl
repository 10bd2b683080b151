{{/*
Refuses values of a mode that is not in use, or of a part that is not enabled: they would be ignored. A value counts as given when it differs from the default,
which `defaults.json` repeats, since templates see only the result of merging.
*/}}
{{- define "backcast.inactive" -}}
{{- $defaults := .Files.Get "defaults.json" | fromJson }}
{{- with .Values }}
{{- $postgres := or (eq .postgres.mode "bundled") (eq .postgres.movedFrom "bundled") }}
{{- $store := or (eq .store.mode "bundled") (eq .store.fallback.mode "bundled") (ne .store.movedFrom "") }}
{{- $sections := list
  (list "postgres" "external" "postgres.mode" (eq .postgres.mode "external"))
  (list "postgres" "bundled" "postgres.mode" $postgres)
  (list "store" "external" "store.mode" (eq .store.mode "external"))
  (list "store" "bundled" "store.mode" $store)
  (list "prefectServer" "external" "prefectServer.mode" (eq .prefectServer.mode "external")) }}
{{- range $section := $sections }}
{{- $part := first $section }}
{{- $mode := index $section 1 }}
{{- $given := include "backcast.inactive.given" (list (printf "%s.%s" $part $mode) (index $.Values $part $mode) (index $defaults $part $mode)) }}
{{- if and $given (not (last $section)) }}
{{- fail (printf "%s is set, but %s is %s, so it would be ignored: remove it, or set %s to %s." $given (index $section 2) (index $.Values $part "mode") (index $section 2) $mode) }}
{{- end }}
{{- end }}
{{- $given := include "backcast.inactive.given" (list "store.fallback.external" .store.fallback.external $defaults.store.fallback.external) }}
{{- if and $given (ne .store.fallback.mode "external") }}
{{- fail (printf "%s is set, but store.fallback.mode is %s, so it would be ignored: remove it, or set store.fallback.mode to external." $given .store.fallback.mode) }}
{{- end }}
{{- $given := include "backcast.inactive.given" (list "prefectServer.auth" .prefectServer.auth $defaults.prefectServer.auth) }}
{{- if and $given (ne .prefectServer.mode "bundled") }}
{{- fail (printf "%s is set, but prefectServer.mode is %s, so it would be ignored: remove it, or set prefectServer.mode to bundled." $given .prefectServer.mode) }}
{{- end }}
{{- if eq .model.backend "embedded" }}
{{- range $key := list "apiKey" "baseUrl" "existingSecret" }}
{{- if get $.Values.model $key }}
{{- fail (printf "model.%s is set, but model.backend is embedded, so it would be ignored: remove it, or set model.backend to openai." $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- include "backcast.inactive.disabled" (list "" (omit . "config" "global") $defaults) }}
{{- $modes := list }}
{{- range include "backcast.pools" $ | fromYaml }}{{ $modes = append $modes .autoscaling.mode }}{{ end }}
{{- $given := include "backcast.inactive.given" (list "workers.defaults.autoscaling" (omit .workers.defaults.autoscaling "mode") $defaults.workers.defaults.autoscaling) }}
{{- if and $given (not (without $modes "off")) }}
{{- fail (printf "%s is set, but the mode of every pool is off, so it would be ignored: remove it, or set workers.defaults.autoscaling.mode to keda or hpa." $given) }}
{{- end }}
{{- range $name, $pool := .workers.pools }}
{{- with $pool }}
{{- $mode := dig "autoscaling" "mode" $.Values.workers.defaults.autoscaling.mode . }}
{{- $given := omit (.autoscaling | default dict) "mode" | keys | sortAlpha }}
{{- if and $given (eq $mode "off") }}
{{- fail (printf "workers.pools.%s.autoscaling.%s is set, but its mode is off, so it would be ignored: remove it, or set workers.pools.%s.autoscaling.mode to keda or hpa." $name (first $given) $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fails for a value beside an `enabled` that is false: (list PREFIX VALUES DEFAULTS). */}}
{{- define "backcast.inactive.disabled" -}}
{{- $prefix := first . }}
{{- $defaults := last . }}
{{- range $key, $value := index . 1 }}
{{- if kindIs "map" $value }}
{{- $path := printf "%s%s" $prefix $key }}
{{- $default := get $defaults $key }}
{{- $default = kindIs "map" $default | ternary $default dict }}
{{- if eq (toJson (get $value "enabled")) "false" }}
{{- with include "backcast.inactive.given" (list $path (omit $value "enabled") (omit $default "enabled")) }}
{{- fail (printf "%s is set, but %s.enabled is false, so it would be ignored: remove it, or set %s.enabled to true." . $path $path) }}
{{- end }}
{{- else }}
{{- include "backcast.inactive.disabled" (list (printf "%s." $path) $value $default) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The path of the first value that differs from its default: (list PATH VALUE DEFAULT). */}}
{{- define "backcast.inactive.given" -}}
{{- $path := first . }}
{{- $value := index . 1 }}
{{- $default := index . 2 }}
{{- if kindIs "map" $value }}
{{- $found := "" }}
{{- range $key, $inner := $value }}
{{- if not $found }}
{{- $found = include "backcast.inactive.given" (list (printf "%s.%s" $path $key) $inner (kindIs "map" $default | ternary (get ($default | default dict) $key) "")) }}
{{- end }}
{{- end }}
{{- $found }}
{{- else if ne (toJson $value) (toJson $default) }}
{{- $path }}
{{- end }}
{{- end }}
