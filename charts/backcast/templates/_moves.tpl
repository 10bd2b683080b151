{{/*
Refuses an upgrade after which accepted runs would be without their row or their objects. What is installed is read from
the cluster: the ConfigMap says where objects and rows are. That of an older release has no word about the rows; then the
StatefulSet or the Secret has.
*/}}
{{- define "backcast.moves" -}}
{{- include "backcast.moves.renamed" . }}
{{- if not (include "backcast.moves.unserved" .) }}
{{- $installed := (lookup "v1" "ConfigMap" .Release.Namespace (include "backcast.name.config" .)).data | default dict }}
{{- $store := (get $installed "backcast.yaml" | fromYaml).store | default dict }}
{{- $before := list }}
{{- range list $store ($store.fallback | default dict) }}{{ if .url }}{{ $before = append $before (include "backcast.moves.store" .) }}{{ end }}{{ end }}
{{- $next := list (include "backcast.config" . | fromYaml).store }}
{{- with (first $next).fallback }}{{ $next = append $next . }}{{ end }}
{{- $after := list }}
{{- range $next }}{{ $after = append $after (include "backcast.moves.store" .) }}{{ end }}
{{- range $place := without $before .Values.store.movedFrom }}
{{- if not (has $place $after) }}
{{- fail (printf "This release keeps objects of its runs in %q, and these values name that store no more: keep it as store.fallback until its objects are copied (docs/operations.md, \"Move the store\"), then set store.movedFrom to %q." $place $place) }}
{{- end }}
{{- end }}
{{- if and $before (not (or (has (first $after) $before) (has .Values.store.movedFrom $before))) }}
{{- fail (printf "The pods that run now can't read %q, where the new ones would write: make it store.fallback first, and exchange the two by the next upgrade (docs/operations.md, \"Move the store\")." (first $after)) }}
{{- end }}
{{- $rows := $installed.database | default (include "backcast.moves.database" .) | default ($installed | empty | ternary "" "external") }}
{{- $target := include "backcast.moves.target" . | default "external" }}
{{- $same := or (not $rows) (eq $rows $target) (and (ne $rows "bundled") (ne $target "bundled") (has "external" (list $rows $target))) }}
{{- if not (or $same (eq $rows .Values.postgres.movedFrom)) }}
{{- fail (printf "This release keeps its runs in PostgreSQL %q, and these values name %q: the API would know none of the accepted runs. Copy the database (docs/operations.md, \"Move the database\"), then set postgres.movedFrom to %q." $rows $target $rows) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fails if the release is installed under another name: all that is installed would be looked up in vain. */}}
{{- define "backcast.moves.renamed" -}}
{{- $name := include "backcast.name.config" . }}
{{- range (lookup "v1" "ConfigMap" .Release.Namespace "").items }}
{{- $labels := .metadata.labels | default dict }}
{{- $ours := and (eq (get $labels "app.kubernetes.io/instance") $.Release.Name) (regexMatch (printf "^%s-[0-9]" $.Chart.Name) (get $labels "helm.sh/chart")) }}
{{- if and $ours (hasKey (.data | default dict) "backcast.yaml") (ne .metadata.name $name) }}
{{- fail (printf "This release is installed as %q, and these values name it %q: the API would know none of the accepted runs. Set fullnameOverride to %q and nameOverride to %q." .metadata.name $name .metadata.name (get $labels "app.kubernetes.io/name")) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether the API has never been ready: then no run was accepted, and the values may be corrected. */}}
{{- define "backcast.moves.unserved" -}}
{{- with lookup "apps/v1" "Deployment" .Release.Namespace (include "backcast.name.api" .) }}
{{- $first := eq "1" (dig "annotations" "deployment.kubernetes.io/revision" "" .metadata) }}
{{- $reasons := list }}
{{- range dig "conditions" list (.status | default dict) }}{{ $reasons = append $reasons .reason }}{{ end }}
{{- if and $first $reasons (not (has "NewReplicaSetAvailable" $reasons)) }}true{{ end }}
{{- end }}
{{- end }}

{{/* The name of a store, of its settings. */}}
{{- define "backcast.moves.store" -}}{{ .url }} at {{ .endpoint | default "AWS" }}{{- end }}

{{/* The name of the database that is installed: `bundled`, or host and name; empty if there is none, or if only a Secret of the
user's knows it. */}}
{{- define "backcast.moves.database" -}}
{{- if lookup "apps/v1" "StatefulSet" .Release.Namespace (include "backcast.name.postgres" .) -}}
bundled
{{- else -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace (include "backcast.name.secret" .) }}
{{- include "backcast.moves.url" (get ($secret.data | default dict) "database-url" | b64dec) }}
{{- end }}
{{- end }}

{{/* The name of the database of these values, likewise. */}}
{{- define "backcast.moves.target" -}}
{{- $external := .Values.postgres.external }}
{{- if ne .Values.postgres.mode "external" -}}
bundled
{{- else if $external.existingSecret -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace $external.existingSecret }}
{{- include "backcast.moves.url" (get ($secret.data | default dict) "database-url" | b64dec) }}
{{- else -}}
{{- include "backcast.moves.url" $external.url }}
{{- end }}
{{- end }}

{{/* Host and name of a database in its URL, without user and password; empty if it is no such URL. (`urlParse` would fail
on a password with odd characters, and show it.) */}}
{{- define "backcast.moves.url" -}}
{{- $url := "^postgres(?:ql)?://(?:[^/]*@)?([^/?@]+)(/[^?@]*)?(?:[?].*)?$" }}
{{- with . }}{{ if regexMatch $url . }}{{ regexReplaceAll $url . "${1}${2}" }}{{ end }}{{ end }}
{{- end }}
