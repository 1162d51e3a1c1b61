{{- /* By what pods choose this release. */}}
{{- define "aegis.injection-name" -}}
{{ .Values.injection.name | default .Release.Name }}
{{- end }}

{{- define "aegis.new-pods" -}}
resourceRules:
  - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}
{{- end }}

{{- /*
Which pods it is for, by the bindings' names. Each binding joins its conditions by "and", so each way to
choose the release needs one: those of other pods never meet an expression of this release.
*/}}
{{- define "aegis.bindings" -}}
{{- $release := include "aegis.injection-name" . }}
{{- $values := list $release }}
{{- if include "aegis.takes-enabled" . }}{{ $values = append $values "enabled" }}{{ end }}
{{- $name := include "aegis.cluster-name" . }}
{{- $given := deepCopy .Values.injection.namespaceSelector }}
{{- $expressions := $given.matchExpressions | default list }}
{{- $clients := dict "key" "kubernetes.io/metadata.name" "operator" "In" "values" (include "aegis.client-namespaces" . | fromYamlArray) }}
{{- $namespaces := set (deepCopy $given) "matchExpressions" (prepend $expressions $clients) }}
{{- $asking := set (deepCopy $given) "matchExpressions" (append (prepend $expressions $clients) (dict "key" "aegis-proxy.io/inject" "operator" "In" "values" $values)) }}
{{ $name }}:
  namespaceSelector: {{ toJson $namespaces }}
  objectSelector:
    matchExpressions:
      - {key: aegis-proxy.io/inject, operator: In, values: {{ toJson $values }}}
# Beside another release.
also.{{ $name }}:
  namespaceSelector: {{ toJson $namespaces }}
  objectSelector:
    matchExpressions:
      - {key: {{ $release }}.aegis-proxy.io/inject, operator: Exists}
      - {key: {{ $release }}.aegis-proxy.io/inject, operator: NotIn, values: [disabled]}
# By the namespace's label.
namespace.{{ $name }}:
  namespaceSelector: {{ toJson $asking }}
  objectSelector:
    matchExpressions:
      - {key: aegis-proxy.io/inject, operator: DoesNotExist}
{{- if .Values.test.enabled }}
# `helm test`, whose pod is in no namespace of clients.
test.{{ $name }}:
  namespaceSelector:
    matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace }}}
  objectSelector:
    matchLabels:
      aegis-proxy.io/inject: {{ $release }}
      app.kubernetes.io/instance: {{ .Release.Name }}
      app.kubernetes.io/component: test
{{- end }}
{{- end }}

{{- /* Of a static pod the API server has a mirror only: changed, it would be none. */}}
{{- define "aegis.is-no-mirror" -}}
{name: is-no-mirror, expression: '!("kubernetes.io/config.mirror" in object.metadata.?annotations.orValue({}))'}
{{- end }}

{{- /* Pods that no sidecar can serve: on the node's network its loopback is everybody's, and it is a program for Linux. */}}
{{- define "aegis.on-windows" -}}
object.spec.?os.?name.orValue("") == "windows" || object.spec.?nodeSelector[?"kubernetes.io/os"].orValue("") == "windows"
{{- end }}

{{- define "aegis.cannot-have-it" -}}
(object.spec.?hostNetwork.orValue(false) || {{ include "aegis.on-windows" . }})
{{- end }}

{{- /* A pod that asked for no release by name and has a sidecar, as by the library chart, is served. */}}
{{- define "aegis.is-not-served-yet" -}}
name: is-not-served-yet
expression: >-
  "aegis-proxy.io/status" in object.metadata.?labels.orValue({}) ||
  {{ printf "%s.aegis-proxy.io/inject" (include "aegis.injection-name" .) | toJson }} in object.metadata.?labels.orValue({}) ||
  object.metadata.?labels[?"aegis-proxy.io/inject"].orValue("enabled") != "enabled" ||
  !object.spec.?initContainers.orValue([]).exists(c, c.?env.orValue([]).exists(e, e.name == "AEGIS_LISTEN"))
{{- end }}

{{- /*
The policies of other releases that act in a namespace of this one's clients. Without a server, as with
`helm template`, there are none.
*/}}
{{- define "aegis.neighbours" -}}
{{- $namespaces := include "aegis.client-namespaces" . | fromYamlArray }}
{{- $found := list }}
{{- with include "aegis.injection-api" . }}
{{- range (lookup . "MutatingAdmissionPolicy" "" "").items }}
{{- $annotations := .metadata.annotations | default dict }}
{{- if and (ne .metadata.name (include "aegis.cluster-name" $)) (hasKey $annotations "aegis-proxy.io/release") }}
{{- $policy := . }}
{{- $meet := false }}
{{- range get $annotations "aegis-proxy.io/namespaces" | splitList "," }}
{{- if has . $namespaces }}{{ $meet = true }}{{ end }}
{{- end }}
{{- if $meet }}
{{- $found = append $found (dict "release" (get $annotations "aegis-proxy.io/release") "enabled" (get $annotations "aegis-proxy.io/takes-enabled" | default "")) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $found }}
{{- end }}

{{- /* Whether the label's value `enabled` means this release: "true" or nothing. */}}
{{- define "aegis.takes-enabled" -}}
{{- $taken := false }}
{{- range include "aegis.neighbours" . | fromJsonArray }}
{{- if .enabled }}{{ $taken = true }}{{ end }}
{{- end }}
{{- if or (eq (toString .Values.injection.default) "true") (and (eq (toString .Values.injection.default) "auto") (not $taken)) }}true{{ end }}
{{- end }}

{{- define "aegis.check" -}}
{{- include "aegis-sidecar.check-options" (include "aegis.sidecar" . | fromYaml) }}
{{- $release := include "aegis.injection-name" . }}
{{- if has $release (list "enabled" "disabled") }}
{{- fail (printf "aegis: pods cannot choose a release by the name %s: set injection.name" $release) }}
{{- end }}
{{- range include "aegis.neighbours" . | fromJsonArray }}
{{- if eq .release $release }}
{{- fail (printf "aegis: another release called %s injects into the same namespaces: set injection.name" $release) }}
{{- end }}
{{- if and .enabled (eq (toString $.Values.injection.default) "true") }}
{{- fail (printf "aegis: the release %s takes the pods with the label aegis-proxy.io/inject: enabled of the same namespaces: set injection.default to false in one of the two" .release) }}
{{- end }}
{{- end }}
{{- end }}

{{- /*
What a pod may choose by annotation, in place of which value. `env`: a variable that is there only when
it is chosen or set. `amount`: a quantity, and where it belongs.
*/}}
{{- define "aegis.choices" -}}
{{- $sidecar := include "aegis.sidecar" . | fromYaml }}
{{- if not $sidecar.backend.addresses }}
{{- if not $sidecar.backend.selector }}
- {annotation: service, variable: service, value: backend.service, default: {{ toJson $sidecar.backend.service }}}
{{- end }}
- {annotation: namespace, variable: backendNamespace, value: backend.namespace, default: {{ toJson $sidecar.backend.namespace }}}
- {annotation: port, variable: port, value: backend.port, default: {{ $sidecar.backend.port | default "auto" | toString | toJson }}}
{{- end }}
- {annotation: protocol, variable: protocol, value: protocol, default: {{ $sidecar.protocol }}}
- {annotation: pool-mode, variable: poolMode, value: pool.mode, default: {{ $sidecar.pool.mode | toJson }}}
- {annotation: balance, variable: balance, value: balance, default: {{ $sidecar.balance }}}
- {annotation: queue-timeout, variable: queueTimeout, value: queue.timeout, default: {{ $sidecar.queue.timeout }}}
- {annotation: request-timeout, variable: requestTimeout, value: requestTimeout, default: {{ toJson $sidecar.requestTimeout }}}
- {annotation: connect-timeout, variable: connectTimeout, value: connectTimeout, default: {{ $sidecar.connectTimeout }}}
- {annotation: tcp-user-timeout, variable: tcpUserTimeout, value: tcpUserTimeout, env: AEGIS_TCP_USER_TIMEOUT, default: {{ toJson $sidecar.tcpUserTimeout }}}
- {annotation: backend-drain, variable: backendDrain, value: backendDrain, env: AEGIS_BACKEND_DRAIN, default: {{ toJson $sidecar.backendDrain }}}
- {annotation: log-level, variable: logLevel, value: log, default: {{ toJson $sidecar.log }}}
- {annotation: image, variable: image, value: image.name, default: {{ printf "%s:%s" $sidecar.image.repository $sidecar.image.tag | toJson }}}
{{- range $kind := list "requests" "limits" }}
{{- range $name := list "cpu" "memory" }}
{{- $amount := get (get $sidecar.resources $kind | default dict) $name }}
- {annotation: {{ $name }}-{{ trimSuffix "s" $kind }}, variable: {{ $name }}{{ trimSuffix "s" $kind | title }}, amount: [{{ $kind }}, {{ $name }}], default: {{ $amount | default "" | toString | toJson }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* The annotations' names, without those that this release does not allow. */}}
{{- define "aegis.annotations" -}}
{{- $names := list }}
{{- range include "aegis.choices" . | fromYamlArray }}
{{- if or (ne .annotation "image") $.Values.injection.imageOverride }}{{ $names = append $names .annotation }}{{ end }}
{{- end }}
{{- toYaml $names }}
{{- end }}

{{- /* What the pod chooses, or else the values: an annotation of this release before one for all. */}}
{{- define "aegis.choices-in-cel" -}}
{{- $prefix := printf "%s.aegis-proxy.io" (include "aegis.injection-name" .) -}}
- name: annotations
  expression: object.metadata.?annotations.orValue({})
{{- range include "aegis.choices" . | fromYamlArray }}
{{- $default := toJson .default }}
{{- if and (eq .variable "poolMode") (not .default) }}
{{- $default = `variables.protocol == "tcp" ? "preconnect" : "request"` }}
{{- end }}
- name: {{ .variable }}
  expression: >-
    variables.annotations[?{{ printf "%s/%s" $prefix .annotation | toJson }}].or(
    variables.annotations[?{{ printf "aegis-proxy.io/%s" .annotation | toJson }}]).orValue({{ $default }})
{{- end }}
{{- end }}

{{- /* "variables.x is a duration within its bounds" */}}
{{- define "aegis.cel-duration" -}}
{{- $x := printf "variables.%s" (index . 0) -}}
{{- $bounds := index . 1 -}}
{{- if $bounds.orOff }}{{ $x }} == "off" || {{ end -}}
{{ $x }}.matches("^[0-9]{1,9}(ms|s|m|h|d)$") &&
[int({{ $x }}.replace("m", "").replace("s", "").replace("h", "").replace("d", "")) * (
{{- $x }}.endsWith("ms") ? 1 : {{ $x }}.endsWith("s") ? 1000 : {{ $x }}.endsWith("m") ? 60000 : {{ $x }}.endsWith("h") ? 3600000 : 86400000)].all(ms,
ms >= {{ include "aegis-sidecar.milliseconds" $bounds.min }} && ms <= {{ include "aegis-sidecar.milliseconds" $bounds.max }})
{{- end }}

{{- /*
What has to hold of a pod that gets the sidecar: "WHAT is IS: CHANGE" or "WHAT: CHANGE" is said where it
does not; `verb` in place of "is". `first`: what the API server would refuse by itself, with less help.
*/}}
{{- define "aegis.rules" -}}
{{- $sidecar := include "aegis.sidecar" . | fromYaml }}
{{- $release := include "aegis.injection-name" . }}
{{- $ports := printf "[%d, %d]" (int $sidecar.listenPort) (int $sidecar.adminPort) }}
{{- $known := include "aegis.annotations" . | fromYamlArray }}
{{- $ours := printf "%s.aegis-proxy.io" $release }}
{{- $strangers := printf `object.metadata.?labels.orValue({}).filter(l, l.endsWith(".aegis-proxy.io/status") && l != "%s/status" && !(l.replace("/status", "/inject") in object.metadata.labels))` $ours }}
{{- $unknown := printf `variables.annotations.filter(a, a.startsWith("aegis-proxy.io/") && !(a.substring(15) in %s) || a.startsWith("%s.aegis-proxy.io/") && !(a.substring(%d) in %s))` (toJson $known) $release (add (len $release) 16) (toJson $known) }}
- expression: "!object.spec.?hostNetwork.orValue(false)"
  what: with hostNetwork the proxy's loopback would be the whole node's
  change: set hostNetwork to false, or remove the label aegis-proxy.io/inject
- expression: '!({{ include "aegis.on-windows" . }})'
  what: the pod is for Windows, and the sidecar is a program for Linux
  change: remove the label aegis-proxy.io/inject
- expression: >-
    object.metadata.?labels[?"aegis-proxy.io/inject"].orValue("enabled") != "enabled" ||
    {{ printf "%s/inject" $ours | toJson }} in object.metadata.?labels.orValue({}) || {{ $strangers }}.size() == 0
  what: "the label aegis-proxy.io/inject: enabled means several releases here, {{ $release }} and"
  verb: ""
  is: >-
    {{ $strangers }}.map(l, l.replace(".aegis-proxy.io/status", "")).join(", ")
  change: name one of them in the label, or set injection.default to false for the others
- expression: >-
    !variables.others.exists(c, c.name == {{ toJson $sidecar.name }}) &&
    (variables.injected || !object.spec.?initContainers.orValue([]).exists(c, c.name == {{ toJson $sidecar.name }}))
  what: a container of the pod is called {{ $sidecar.name }}, as the sidecar is
  change: rename it, or set sidecar.name in the chart's values
- expression: >-
    variables.injected || !object.spec.?volumes.orValue([]).exists(v, v.name in [{{ printf "%s-token" $sidecar.name | toJson }}, {{ printf "%s-state" $sidecar.name | toJson }}])
  what: a volume of the pod is called {{ $sidecar.name }}-token or {{ $sidecar.name }}-state, as the sidecar's are
  change: rename it, or set sidecar.name in the chart's values
- expression: >-
    !variables.others.exists(c, c.?ports.orValue([]).exists(p, p.?protocol.orValue("TCP") == "TCP" && p.containerPort in {{ $ports }}) ||
    c.?env.orValue([]).exists(e, e.name == "AEGIS_LISTEN" && {{ $ports }}.exists(p, e.?value.orValue("").endsWith(":" + string(p)))))
  what: a container that has a port of the sidecar, {{ int $sidecar.listenPort }} or {{ int $sidecar.adminPort }}, too
  is: >-
    variables.others.filter(c, c.?ports.orValue([]).exists(p, p.?protocol.orValue("TCP") == "TCP" && p.containerPort in {{ $ports }}) ||
    c.?env.orValue([]).exists(e, e.name == "AEGIS_LISTEN" && {{ $ports }}.exists(p, e.?value.orValue("").endsWith(":" + string(p))))).map(c, c.name).join(", ")
  change: change it there, or set sidecar.listenPort and sidecar.adminPort of the release {{ .Release.Name }}
- expression: {{ printf "%s.size() == 0" $unknown | toJson }}
  what: unknown annotation
  verb: ""
  is: {{ printf `%s.join(", ")` $unknown | toJson }}
  change: "remove it. There are {{ initial $known | join ", " }} and {{ last $known }}"
{{- $annotation := "the annotation aegis-proxy.io/" }}
{{- $name := `matches("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")` }}
{{- range include "aegis.choices" . | fromYamlArray }}
{{- $x := printf "variables.%s" .variable }}
{{- $duration := get (include "aegis-sidecar.durations" $ | fromYaml) (.value | default "") }}
{{- if eq .annotation "service" }}
- expression: {{ $x }} != ""
  what: no backend
  change: set the annotation aegis-proxy.io/service to the name of a Service in the namespace {{ $sidecar.backend.namespace }}
- expression: {{ $x }} == "" || {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && {{ $x }} != "none"
  what: {{ $annotation }}service
  is: {{ $x }}
  change: set it to the name of a Service, without its namespace, of lower-case letters, digits and dashes, 63 at most
{{- else if eq .annotation "namespace" }}
- expression: {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && {{ $x }} != "auto"
  what: {{ $annotation }}namespace
  is: {{ $x }}
  change: set it to the name of the Service's namespace
{{- else if eq .annotation "port" }}
- expression: {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && ({{ $x }}.matches("[a-z]") || {{ $x }}.matches("^[0-9]{1,5}$") && int({{ $x }}) >= 1 && int({{ $x }}) <= 65535)
  what: {{ $annotation }}port
  is: {{ $x }}
  change: set it to the name of the Service's port, or to a number from 1 to 65535
{{- else if eq .annotation "protocol" }}
- expression: {{ $x }} in ["tcp", "chronos", "http1"]
  what: {{ $annotation }}protocol
  is: {{ $x }}
  change: set it to tcp, chronos or http1
{{- else if eq .annotation "pool-mode" }}
- expression: {{ $x }} in ["preconnect", "session", "request"]
  what: {{ $annotation }}pool-mode
  is: {{ $x }}
  change: set it to preconnect, session or request
- expression: variables.protocol != "tcp" || !({{ $x }} in ["session", "request"])
  what: the protocol is tcp, whose bytes nobody can tell apart, and the pool mode
  is: {{ $x }}
  change: set {{ $annotation }}pool-mode to preconnect, or aegis-proxy.io/protocol to chronos or http1
{{- else if eq .annotation "balance" }}
- expression: {{ $x }} in ["least_conn", "round_robin", "random_two", "peak_ewma", "source_hash", "key_hash"]
  what: {{ $annotation }}balance
  is: {{ $x }}
  change: set it to least_conn, round_robin, random_two, peak_ewma, source_hash or key_hash
- expression: {{ $x }} != "key_hash" || variables.protocol == "chronos" && variables.poolMode == "request"
  what: balancing by key_hash needs the protocol chronos and the pool mode request, and what there
  is: variables.protocol + " and " + variables.poolMode
  change: remove the annotations aegis-proxy.io/protocol and aegis-proxy.io/pool-mode, or set aegis-proxy.io/balance to least_conn
{{- else if eq .annotation "log-level" }}
- expression: >-
    {{ $x }}.size() <= 1024 &&
    {{ $x }}.matches("^([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace)(,([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace))*$")
  what: {{ $annotation }}log-level
  is: {{ $x }}
  change: set it to off, error, warn, info, debug or trace
{{- else if eq .annotation "image" }}
{{- $part := "[a-z0-9]+([._-]+[a-z0-9]+)*" }}
- expression: >-
    {{ $x }}.size() <= 512 && {{ $x }}.matches("^([A-Za-z0-9.-]+(:[0-9]+)?/)?{{ $part }}(/{{ $part }})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$")
  first: true
  what: {{ $annotation }}image
  is: {{ $x }}
  change: set it to an image, such as {{ .default }}
{{- else if .amount }}
{{- $least := eq (index .amount 0) "limits" | ternary "8Mi" "1Mi" }}
{{- $bounds := eq (index .amount 1) "cpu" | ternary "isGreaterThan(quantity(\"0\"))" (printf "compareTo(quantity(%q)) >= 0" $least) }}
{{- $most := eq (index .amount 1) "cpu" | ternary "256" "1Ti" }}
- expression: {{ if eq .default "" }}{{ $x }} == "" || {{ end }}{{ $x }}.size() <= 32 && isQuantity({{ $x }}) && quantity({{ $x }}).{{ $bounds }} && quantity({{ $x }}).compareTo(quantity("{{ $most }}")) <= 0
  first: true
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: "set it to {{ eq (index .amount 1) "cpu" | ternary "cores such as 500m or 2, 256 at most" (printf "bytes such as 64Mi, %s at least" $least) }}"
{{- else if $duration }}
- expression: >-
    {{ if .env }}{{ $x }} == "" || {{ end }}{{ include "aegis.cel-duration" (list .variable $duration) | nindent 4 | trim }}
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to {{ include "aegis-sidecar.accepted" $duration }}
{{- end }}
{{- end }}
{{- range $amount := list "cpu" "memory" }}
{{- $request := printf "variables.%sRequest" $amount }}
{{- $limit := printf "variables.%sLimit" $amount }}
- expression: >-
    !isQuantity({{ $request }}) || !isQuantity({{ $limit }}) || quantity({{ $request }}).compareTo(quantity({{ $limit }})) <= 0
  first: true
  what: the sidecar's {{ $amount }} limit is below its request, which
  is: {{ $request }}
  change: set the annotations aegis-proxy.io/{{ $amount }}-request and aegis-proxy.io/{{ $amount }}-limit so that the limit is at least the request
{{- end }}
{{- end }}
