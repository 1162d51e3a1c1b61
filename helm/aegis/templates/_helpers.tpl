{{- define "aegis.labels" -}}
app.kubernetes.io/name: aegis
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* The name of what belongs to no namespace. */}}
{{- define "aegis.cluster-name" -}}
{{ .Release.Name }}.{{ .Release.Namespace }}.aegis-proxy.io
{{- end }}

{{- /* A pod may have the sidecars of several releases: `aegis` is that of the one that `enabled` means. */}}
{{- define "aegis.sidecar-name" -}}
{{- if include "aegis.takes-enabled" . -}}
aegis
{{- else -}}
aegis-{{ include "aegis.injection-name" . | replace "." "-" | trunc 51 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* The sidecar's values, with its name and the backends' namespaces in place. */}}
{{- define "aegis.sidecar" -}}
{{- $values := deepCopy .Values.sidecar -}}
{{- $_ := include "aegis-sidecar.fill" $values -}}
{{- range $values.routes | default (list $values) -}}
{{- $_ := set .backend "namespace" (.backend.namespace | default $.Release.Namespace) -}}
{{- end -}}
{{- $_ := set $values "name" ($values.name | default (include "aegis.sidecar-name" .)) -}}
{{- toYaml $values }}
{{- end }}

{{- /* Its routes, each with all values: without `routes` the sidecar itself is the only one. */}}
{{- define "aegis.routes" -}}
{{- $sidecar := include "aegis.sidecar" . | fromYaml -}}
{{- $routes := list -}}
{{- range $sidecar.routes -}}
{{- $routes = append $routes (include "aegis-sidecar.of-route" (list $sidecar .) | fromYaml) -}}
{{- end -}}
{{- $routes | default (list $sidecar) | toYaml }}
{{- end }}

{{- /* The version of the API that can inject, or nothing. */}}
{{- define "aegis.injection-api" -}}
{{- $has := .Capabilities.APIVersions -}}
{{- if .Values.injection.enabled -}}
{{- if $has.Has "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy" -}}
admissionregistration.k8s.io/v1
{{- else if $has.Has "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy" -}}
admissionregistration.k8s.io/v1beta1
{{- end }}
{{- end }}
{{- end }}

{{- /* The namespaces of the clients, or the release's own where none is named. */}}
{{- define "aegis.client-namespaces" -}}
{{- $namespaces := list -}}
{{- range .Values.clients }}{{ $namespaces = append $namespaces .namespace }}{{ end -}}
{{- $namespaces | default (list .Release.Namespace) | uniq | sortAlpha | toYaml }}
{{- end }}

{{- /*
The labels of the pods with this release's sidecar: one that the injection sets, or else the one that
people set for the library chart and the component.
*/}}
{{- define "aegis.sidecar-pods" -}}
{{- if include "aegis.injection-api" . -}}
{{ dict (printf "%s.aegis-proxy.io/status" (include "aegis.injection-name" .)) "injected" | toJson }}
{{- else -}}
{{ dict "aegis-proxy.io/inject" (eq (toString .Values.injection.default) "false" | ternary (include "aegis.injection-name" .) "enabled") | toJson }}
{{- end }}
{{- end }}
