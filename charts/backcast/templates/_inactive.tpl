{{/*
Refuses values of a mode that is not in use, or of a part that is not enabled: they would be ignored. A value counts as given when it differs from the default,
which `defaults.json` repeats, since templates see only the result of merging.
*/}}
{{- define "backcast.inactive" -}}
{{- $defaults := .Files.Get "defaults.json" | fromJson }}
{{- with .Values }}
{{- $postgres := or (eq .postgres.mode "bundled") (eq .postgres.movedFrom "bundled") }}
{{- $store := or (eq .store.mode "bundled") (eq .store.fallback.mode "bundled") (ne .store.movedFrom "") }}
{{- /* A section, the owner of the mode in which it is used, that mode, and whether it is used. */}}
{{- $sections := list
  (list "postgres.external" "postgres" "external" (eq .postgres.mode "external"))
  (list "postgres.bundled" "postgres" "bundled" $postgres)
  (list "store.external" "store" "external" (eq .store.mode "external"))
  (list "store.bundled" "store" "bundled" $store)
  (list "store.fallback.external" "store.fallback" "external" (eq .store.fallback.mode "external"))
  (list "prefectServer.external" "prefectServer" "external" (eq .prefectServer.mode "external"))
  (list "prefectServer.auth" "prefectServer" "bundled" (eq .prefectServer.mode "bundled"))
  (list "prefectServer.publicUrl" "prefectServer" "bundled or external" (ne .prefectServer.mode "off")) }}
{{- range $section := $sections }}
{{- $owner := index $section 1 }}
{{- $value := $.Values }}
{{- $default := $defaults }}
{{- $mode := $.Values }}
{{- range first $section | splitList "." }}{{ $value = get $value . }}{{ $default = get $default . }}{{ end }}
{{- range printf "%s.mode" $owner | splitList "." }}{{ $mode = get $mode . }}{{ end }}
{{- $given := include "backcast.inactive.given" (list (first $section) $value $default) }}
{{- if and $given (not (last $section)) }}
{{- fail (printf "%s is set, but %s.mode is %s, so it would be ignored: remove it, or set %s.mode to %s." $given $owner $mode $owner (index $section 2)) }}
{{- end }}
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
