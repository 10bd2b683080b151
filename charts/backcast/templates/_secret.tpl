{{/* The contents of the generated Secret, and the required keys of existing ones. */}}

{{/* The keys with the passwords of the bundled PostgreSQL's roles, as YAML. */}}
{{- define "backcast.secret.passwords" -}}
{{- range list "postgres" "backcast" "api" "worker" "steward" "prefect" "scaler" }}
- {{ . }}-password
{{- end }}
{{- end }}

{{/* Secrets in the values, by key, as YAML: pods roll when they change. */}}
{{- define "backcast.secret.given" -}}
{{- $given := dict "model-api-key" .Values.model.apiKey }}
{{- if eq .Values.postgres.mode "external" }}
{{- with .Values.postgres.external }}
{{- $given = merge $given (dict "database-url" .url "prefect-database-url" (include "backcast.secret.prefect" .prefectUrl) "admin-url" .adminUrl "scaler-url" .scalerUrl
  "api-database-url" .apiUrl "worker-database-url" .workerUrl "steward-database-url" .stewardUrl) }}
{{- end }}
{{- end }}
{{- if eq .Values.store.mode "external" }}
{{- with .Values.store.external }}
{{- $given = merge $given (dict "s3-access-key" .accessKey "s3-secret-key" .secretKey) }}
{{- end }}
{{- end }}
{{- if eq .Values.store.fallback.mode "external" }}
{{- with .Values.store.fallback.external }}
{{- $given = merge $given (dict "fallback-s3-access-key" .accessKey "fallback-s3-secret-key" .secretKey) }}
{{- end }}
{{- end }}
{{- range $key, $value := $given }}
{{- if $value }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* The URL of Prefect's database as Prefect needs it: SQLAlchemy passes each parameter to asyncpg, which takes no other. */}}
{{- define "backcast.secret.prefect" -}}
{{- $parts := splitList "?" . }}
{{- $query := list }}
{{- range rest $parts | join "?" | splitList "&" }}
{{- if not (regexMatch "^(channel_binding|connect_timeout|gssencmode|keepalives[a-z_]*)=" .) }}{{ $query = append $query (regexReplaceAll "^sslmode=" . "ssl=") }}{{ end }}
{{- end }}
{{- list (regexReplaceAll "^postgres(ql)?([+]asyncpg)?://" (first $parts) "postgresql+asyncpg://") (compact $query | join "&") | compact | join "?" }}
{{- end }}

{{/* Keys that are generated, with a new value for each, as YAML. */}}
{{- define "backcast.secret.generated" -}}
{{- with .Values.auth }}
{{- if and .enabled (not .existingSecret) }}
api-key: {{ randAlphaNum 40 }}
{{- end }}
{{- end }}
{{- if and (eq .Values.postgres.mode "bundled") (not .Values.postgres.bundled.existingSecret) }}
{{- range include "backcast.secret.passwords" . | fromYamlArray }}
{{ . }}: {{ randAlphaNum 32 }}
{{- end }}
{{- end }}
{{- with .Values.prefectServer }}
{{- if and (eq .mode "bundled") .auth.enabled (not .auth.existingSecret) }}
prefect-auth-string: admin:{{ randAlphaNum 32 }}
{{- end }}
{{- end }}
{{- if and (eq .Values.store.mode "bundled") (not .Values.store.bundled.existingSecret) }}
s3-access-key: {{ randAlphaNum 20 }}
s3-secret-key: {{ randAlphaNum 40 }}
{{- end }}
{{- if and (eq .Values.store.fallback.mode "bundled") (not .Values.store.bundled.existingSecret) }}
bundled-s3-access-key: {{ randAlphaNum 20 }}
bundled-s3-secret-key: {{ randAlphaNum 40 }}
{{- end }}
{{- end }}

{{/* The value that replaces each generated key. */}}
{{- define "backcast.secret.sources" -}}
api-key: auth.existingSecret
{{- range include "backcast.secret.passwords" . | fromYamlArray }}
{{ . }}: postgres.bundled.existingSecret
{{- end }}
prefect-auth-string: prefectServer.auth.existingSecret
s3-access-key: store.bundled.existingSecret
s3-secret-key: store.bundled.existingSecret
bundled-s3-access-key: store.bundled.existingSecret
bundled-s3-secret-key: store.bundled.existingSecret
{{- end }}

{{/* Existing Secrets and the keys they must have, as YAML. */}}
{{- define "backcast.secret.existing" -}}
{{- $values := .Values }}
{{- $keda := include "backcast.uses.keda" . }}
{{- $found := dict }}
{{- $wanted := list (list $values.auth.enabled $values.auth.existingSecret "api-key") }}
{{- $wanted = append $wanted (list (eq (include "backcast.model.backend" .) "openai") $values.model.existingSecret "model-api-key") }}
{{- with $values.postgres }}
{{- if eq .mode "bundled" }}
{{- $wanted = append $wanted (concat (list true .bundled.existingSecret) (include "backcast.secret.passwords" $ | fromYamlArray)) }}
{{- else }}
{{- $wanted = append $wanted (list true .external.existingSecret "database-url") }}
{{- $wanted = append $wanted (list (eq $values.prefectServer.mode "bundled") .external.existingSecret "prefect-database-url") }}
{{- $wanted = append $wanted (list $keda .external.existingSecret "scaler-url") }}
{{- $wanted = append $wanted (list .external.rolePerPart .external.existingSecret "api-database-url" "worker-database-url" "steward-database-url") }}
{{- end }}
{{- end }}
{{- with $values.store }}
{{- $wanted = append $wanted (list true (index . .mode "existingSecret") "s3-access-key" "s3-secret-key") }}
{{- $wanted = append $wanted (list (eq .fallback.mode "bundled") .bundled.existingSecret "s3-access-key" "s3-secret-key") }}
{{- $wanted = append $wanted (list (eq .fallback.mode "external") .fallback.external.existingSecret "fallback-s3-access-key" "fallback-s3-secret-key") }}
{{- end }}
{{- with $values.prefectServer }}
{{- $wanted = append $wanted (list (and (eq .mode "bundled") .auth.enabled) .auth.existingSecret "prefect-auth-string") }}
{{- $wanted = append $wanted (list (eq .mode "external") .external.existingSecret) }}
{{- end }}
{{- range $wanted }}
{{- if and (first .) (index . 1) }}
{{- $_ := set $found (index . 1) (concat (get $found (index . 1) | default list) (slice . 2) | uniq) }}
{{- end }}
{{- end }}
{{- toYaml $found }}
{{- end }}

{{/* Settings that are secrets, and the values that replace them. */}}
{{- define "backcast.config.secrets" -}}
api.keys: auth.existingSecret
api.read_keys: auth.existingSecret
database.url: postgres.external.existingSecret
model.api_key: model.existingSecret
prefect.api_key: prefectServer.external.existingSecret
prefect.auth_string: prefectServer.auth.existingSecret or prefectServer.external.existingSecret
setup.admin_url: postgres.external.existingSecret
setup.api_url: postgres.external.existingSecret
setup.prefect_url: postgres.external.existingSecret
setup.scaler_url: postgres.external.existingSecret
setup.steward_url: postgres.external.existingSecret
setup.worker_url: postgres.external.existingSecret
store.access_key: store.external.existingSecret
store.fallback.access_key: store.fallback.external.existingSecret
store.fallback.secret_key: store.fallback.external.existingSecret
store.secret_key: store.external.existingSecret
{{- end }}

{{/* Settings that the chart sets for each part, and the change to make instead. */}}
{{- define "backcast.config.taken" -}}
{{- range $part := list "api" "worker" "steward" "model" }}
{{ $part }}.host: use listen
{{ $part }}.port: leave it out; the port for callers is that of a Service or an Ingress
{{- end }}
api.metrics_host: use listen
api.metrics_port: leave it out; networkPolicy.monitoringNamespace decides who reaches it
api.prefect_ui: use prefectServer.publicUrl
builtin_tasks: use workers.pools.<name>.builtinTasks
model.backend: use model.backend
model.base_url: use model.baseUrl
model.name: use model.name
prefect.api_url: use prefectServer.mode and prefectServer.external.apiUrl
store.ca_bundle: use store.external.caBundle
store.endpoint: use store.external.endpoint
store.fallback: use store.fallback
store.public_endpoint: use store.publicEndpoint
store.url: use store.bundled.bucket, or store.external.bucket and prefix
tasks: use workers.pools.<name>.tasks
steward.deletion_cost: use rbac.create
worker.grace: use workers.defaults.grace, which the pods' termination grace follows
worker.pool: name it in workers.pools
worker.slots: use workers.defaults.slots
{{- end }}
