{{- /*
A value as a literal of CEL, with the types that MutatingAdmissionPolicy gives to the fields of an
object: `include "aegis-sidecar.cel" (list "Object.spec.volumes" $value)`.

So what the policy injects and what the library's users include are the same template. A string
that begins with `cel::` is an expression, not text: thus the policy puts a look-up in the place of a
value. (No value begins like that: neither a host with its port nor an image has two colons.)
*/}}
{{- define "aegis-sidecar.cel" -}}
{{- $type := index . 0 -}}
{{- $value := index . 1 -}}
{{- $items := list -}}
{{- if kindIs "slice" $value -}}
  {{- range $value }}{{ $items = append $items (include "aegis-sidecar.cel" (list $type .)) }}{{ end -}}
  [{{ join ", " $items }}]
{{- else if not (kindIs "map" $value) -}}
  {{- if hasPrefix "cel::" (toString $value) }}{{ trimPrefix "cel::" $value }}{{ else }}{{ toJson $value }}{{ end -}}
{{- else if has (splitList "." $type | last) (list "limits" "requests") -}}
  {{- range $key, $item := $value -}}
    {{- $items = append $items (printf "%s: %s" (toJson $key) (include "aegis-sidecar.cel" (list $type $item))) -}}
  {{- end -}}
  {{ printf "{%s}" (join ", " $items) }}
{{- else -}}
  {{- range $key, $item := $value -}}
    {{- $items = append $items (printf "%s: %s" $key (include "aegis-sidecar.cel" (list (printf "%s.%s" $type $key) $item))) -}}
  {{- end -}}
  {{ printf "%s{%s}" $type (join ", " $items) }}
{{- end -}}
{{- end }}
