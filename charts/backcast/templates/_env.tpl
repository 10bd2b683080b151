{{/*
Environment variables, one helper for each concern; each gets (dict "root" . "part" … "pool" …). `backcast.env.from`
takes secret values from Secrets; the kubelet builds a URL from the variables above it.
*/}}

{{/* The environment of a container: the concerns in "env", then the user's variables, which replace ours. */}}
{{- define "backcast.env" -}}
{{- $given := dict }}
{{- $order := list }}
{{- range $source := list .root.Values.extraEnv .part.extraEnv .part.env }}
{{- if kindIs "slice" $source }}
{{- range $source }}
{{- $_ := set $given .name (hasKey . "valueFrom" | ternary (pick . "valueFrom") (get . "value")) }}
{{- $order = append $order .name }}
{{- end }}
{{- else }}
{{- range $name, $value := $source }}
{{- $_ := set $given $name $value }}
{{- $order = append $order $name }}
{{- end }}
{{- end }}
{{- end }}
{{- range $concern := .env }}
{{- range include (printf "backcast.env.%s" $concern) $ | fromYamlArray }}
{{- if not (hasKey $given .name) }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name := uniq $order }}
{{- $value := get $given $name }}
{{- if kindIs "map" $value }}
- {{ merge (dict "name" $name) $value | toYaml | nindent 2 | trim }}
{{- else if not (kindIs "invalid" $value) }}
- name: {{ $name }}
  value: {{ kindIs "float64" $value | ternary (toJson $value) (toString $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* A variable from a key of the generated or the existing Secret: (list ROOT NAME KEY EXISTING [OPTIONAL]). */}}
{{- define "backcast.env.from" -}}
- name: {{ index . 1 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 3 | default (include "backcast.name.secret" (first .)) }}
      key: {{ index . 2 }}
      {{- if gt (len .) 4 }}
      optional: true
      {{- end }}
{{- end }}

{{- define "backcast.env.config" -}}
- name: BACKCAST_CONFIG
  value: /etc/backcast/backcast.yaml
{{- end }}

{{/* The database: with the part's own role, if there is one, else with the one that owns the schema. */}}
{{- define "backcast.env.database" -}}
{{- $component := include "backcast.component" .root }}
{{- $own := and (include "backcast.uses.roles" .root | eq "true") (has $component (list "api" "worker" "steward")) }}
{{- include "backcast.env.role" (list .root "BACKCAST_DATABASE__URL" "DATABASE_PASSWORD" ($own | ternary $component "")) }}
{{- end }}

{{/* The URL of a part's role, or of the owner for the part "": (list ROOT NAME NAME-OF-ITS-PASSWORD PART). */}}
{{- define "backcast.env.role" -}}
{{- $root := first . }}
{{- $part := index . 3 }}
{{- with $root.Values.postgres }}
{{- if eq .mode "external" }}
{{- include "backcast.env.from" (list $root (index $ 1) (list $part "database-url" | compact | join "-") .external.existingSecret) }}
{{- else }}
{{- include "backcast.env.from" (list $root (index $ 2) (printf "%s-password" ($part | default "backcast")) .bundled.existingSecret) }}
- name: {{ index $ 1 }}
  value: postgresql://{{ list "backcast" $part | compact | join "_" }}:$({{ index $ 2 }})@{{ include "backcast.name.postgres" $root }}:5432/backcast
{{- end }}
{{- end }}
{{- end }}

{{/* The parts' roles, for those who make or try them. */}}
{{- define "backcast.env.roles" -}}
{{- if include "backcast.uses.roles" .root }}
{{- range $part := list "api" "worker" "steward" }}
{{ include "backcast.env.role" (list $.root (printf "BACKCAST_SETUP__%s_URL" (upper $part)) (printf "%s_PASSWORD" (upper $part)) $part) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.env.store" -}}
{{- $existing := index .root.Values.store .root.Values.store.mode "existingSecret" }}
{{- if include "backcast.store.keys" .root }}
{{- include "backcast.env.from" (list .root "BACKCAST_STORE__ACCESS_KEY" "s3-access-key" $existing) }}
{{ include "backcast.env.from" (list .root "BACKCAST_STORE__SECRET_KEY" "s3-secret-key" $existing) }}
{{- end }}
{{- with .root.Values.store }}
{{- if eq .fallback.mode "bundled" }}
{{ include "backcast.env.bundled" (list $.root .fallback.kind "BACKCAST_STORE__FALLBACK__ACCESS_KEY" "BACKCAST_STORE__FALLBACK__SECRET_KEY") }}
{{- else if and (eq .fallback.mode "external") (or .fallback.external.accessKey .fallback.external.existingSecret) }}
{{ include "backcast.env.from" (list $.root "BACKCAST_STORE__FALLBACK__ACCESS_KEY" "fallback-s3-access-key" .fallback.external.existingSecret) }}
{{ include "backcast.env.from" (list $.root "BACKCAST_STORE__FALLBACK__SECRET_KEY" "fallback-s3-secret-key" .fallback.external.existingSecret) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The keys of a bundled server: (list ROOT KIND NAME NAME). As a fallback it has keys of its own, because those of the
store may become those of a bucket elsewhere. */}}
{{- define "backcast.env.bundled" -}}
{{- $root := first . }}
{{- $store := $root.Values.store }}
{{- $existing := $store.bundled.existingSecret }}
{{- $older := and (eq $store.fallback.mode "bundled") (eq $store.fallback.kind (index . 1)) (not $existing) | ternary "bundled-" "" }}
{{- include "backcast.env.from" (list $root (index . 2) (printf "%ss3-access-key" $older) $existing) }}
{{ include "backcast.env.from" (list $root (index . 3) (printf "%ss3-secret-key" $older) $existing) }}
{{- end }}

{{/* Whether the store has keys; without them the pods' own identity is used. */}}
{{- define "backcast.store.keys" -}}
{{- with .Values.store }}{{ if or (eq .mode "bundled") .external.accessKey .external.existingSecret }}true{{ end }}{{ end }}
{{- end }}

{{- define "backcast.env.keys" -}}
{{- with .root.Values.auth }}
{{- if .enabled }}
{{- include "backcast.env.from" (list $.root "BACKCAST_API__KEYS" "api-key" .existingSecret) }}
{{ include "backcast.env.from" (list $.root "BACKCAST_API__READ_KEYS" "api-read-key" .existingSecret "optional") }}
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.env.model" -}}
{{- with .root.Values.model }}
{{- if and (or .apiKey .existingSecret) (eq (include "backcast.model.backend" $.root) "openai") }}
{{- include "backcast.env.from" (list $.root "BACKCAST_MODEL__API_KEY" "model-api-key" .existingSecret) }}
{{- end }}
{{- end }}
{{- end }}

{{/* For the processes that publish to a Prefect server. */}}
{{- define "backcast.env.prefect" -}}
{{- with .root.Values.prefectServer }}
{{- if and (eq .mode "bundled") .auth.enabled }}
{{- include "backcast.env.from" (list $.root "BACKCAST_PREFECT__AUTH_STRING" "prefect-auth-string" .auth.existingSecret) }}
{{- else if and (eq .mode "external") .external.existingSecret }}
{{- include "backcast.env.from" (list $.root "BACKCAST_PREFECT__AUTH_STRING" "prefect-auth-string" .external.existingSecret "optional") }}
{{ include "backcast.env.from" (list $.root "BACKCAST_PREFECT__API_KEY" "prefect-api-key" .external.existingSecret "optional") }}
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.env.pool" -}}
- name: BACKCAST_WORKER__POOL
  value: {{ .pool }}
- name: BACKCAST_WORKER__SLOTS
  value: {{ .part.slots | quote }}
- name: BACKCAST_WORKER__GRACE
  value: {{ .part.grace | quote }}
- name: BACKCAST_TASKS
  value: {{ join "," .part.tasks | quote }}
- name: BACKCAST_BUILTIN_TASKS
  value: {{ .part.builtinTasks | quote }}
{{- end }}

{{/* For `backcast setup`: the roles and databases that it makes besides the schema. */}}
{{- define "backcast.env.setup" -}}
{{- with .root.Values.postgres }}
{{- if eq .mode "external" }}
{{- include "backcast.env.from" (list $.root "BACKCAST_SETUP__ADMIN_URL" "admin-url" .external.existingSecret "optional") }}
{{ include "backcast.env.from" (list $.root "BACKCAST_SETUP__SCALER_URL" "scaler-url" .external.existingSecret "optional") }}
{{- else }}
{{- $host := include "backcast.name.postgres" $.root }}
{{- include "backcast.env.from" (list $.root "POSTGRES_PASSWORD" "postgres-password" .bundled.existingSecret) }}
{{ include "backcast.env.from" (list $.root "SCALER_PASSWORD" "scaler-password" .bundled.existingSecret) }}
- name: BACKCAST_SETUP__ADMIN_URL
  value: postgresql://postgres:$(POSTGRES_PASSWORD)@{{ $host }}:5432/postgres
- name: BACKCAST_SETUP__SCALER_URL
  value: postgresql://backcast_scaler:$(SCALER_PASSWORD)@{{ $host }}:5432/backcast
{{- end }}
{{- end }}
{{- end }}

{{/* The Prefect server's database, for our processes that make it or wait for it. */}}
{{- define "backcast.env.prefectDatabase" -}}
{{- if eq .root.Values.prefectServer.mode "bundled" }}
{{- include "backcast.prefect.database" (list .root "BACKCAST_SETUP__PREFECT_URL") }}
{{- end }}
{{- end }}

{{/* (list ROOT NAME) */}}
{{- define "backcast.prefect.database" -}}
{{- $root := first . }}
{{- with $root.Values.postgres }}
{{- if eq .mode "external" }}
{{- include "backcast.env.from" (list $root (index $ 1) "prefect-database-url" .external.existingSecret) }}
{{- else }}
{{- include "backcast.env.from" (list $root "HISTORY_PASSWORD" "prefect-password" .bundled.existingSecret) }}
- name: {{ index $ 1 }}
  value: postgresql+asyncpg://prefect:$(HISTORY_PASSWORD)@{{ include "backcast.name.postgres" $root }}:5432/prefect
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.env.prefectServer" -}}
{{- include "backcast.prefect.database" (list .root "PREFECT_API_DATABASE_CONNECTION_URL") }}
{{- with .root.Values.prefectServer.auth }}
{{- if .enabled }}
{{ include "backcast.env.from" (list $.root "PREFECT_SERVER_API_AUTH_STRING" "prefect-auth-string" .existingSecret) }}
{{- end }}
{{- end }}
- name: PREFECT_HOME
  value: /tmp/prefect
- name: PREFECT_UI_STATIC_DIRECTORY  # the default is Prefect's own folder, which is read-only
  value: /tmp/prefect/ui
- name: PREFECT_UI_API_URL  # on the host that serves the pages
  value: /api
- name: PREFECT_SERVER_ANALYTICS_ENABLED
  value: "false"
- name: PREFECT_SERVER_LOGGING_LEVEL
  value: WARNING
# Less CPU per run: the disabled services serve only flows, automations and the feed of raw events.
- name: PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE
  value: "50"
- name: PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL
  value: "1"
- name: PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED
  value: "false"
- name: PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED
  value: "false"
{{- end }}

{{- define "backcast.env.postgres" -}}
{{ include "backcast.env.from" (list .root "POSTGRES_PASSWORD" "postgres-password" .part.existingSecret) }}
- name: PGDATA  # below the volume's root, which may have a lost+found
  value: /var/lib/postgresql/data/pgdata
{{- end }}

{{- define "backcast.env.minio" -}}
{{ include "backcast.env.bundled" (list .root "minio" "MINIO_ROOT_USER" "MINIO_ROOT_PASSWORD") }}
- name: MINIO_BROWSER
  value: "off"
- name: HOME
  value: /tmp
{{- end }}

{{- define "backcast.env.seaweedfs" -}}
{{ include "backcast.env.bundled" (list .root "seaweedfs" "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY") }}
- name: HOME
  value: /tmp
{{- end }}

{{/* For the command line, as a caller from outside uses it. */}}
{{- define "backcast.env.client" -}}
{{ include "backcast.env.url" . }}
{{- with .root.Values.auth }}
{{- if .enabled }}
{{ include "backcast.env.from" (list $.root "BACKCAST_API_KEY" "api-key" .existingSecret) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "backcast.env.url" -}}
- name: BACKCAST_URL
  value: http://{{ include "backcast.name.api" .root }}:8000
{{- end }}
