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

{{- /* Whether the container `c` is a sidecar, of this release or any other. */}}
{{- define "aegis.is-a-sidecar" -}}
c.?env.orValue([]).exists(e, e.name in ["AEGIS_LISTEN", "AEGIS_ROUTES"])
{{- end }}

{{- /* A pod that asked for no release by name and has a sidecar, as by the library chart, is served. */}}
{{- define "aegis.is-not-served-yet" -}}
name: is-not-served-yet
expression: >-
  "aegis-proxy.io/status" in object.metadata.?labels.orValue({}) ||
  {{ printf "%s.aegis-proxy.io/inject" (include "aegis.injection-name" .) | toJson }} in object.metadata.?labels.orValue({}) ||
  object.metadata.?labels[?"aegis-proxy.io/inject"].orValue("enabled") != "enabled" ||
  !object.spec.?initContainers.orValue([]).exists(c, {{ include "aegis.is-a-sidecar" . }})
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
What a pod may choose by annotation, in place of which value, and the variable of CEL that holds it.
`kind`: which rule it keeps. `env`: the variable of the program that is there only when it is chosen or set.
`amount`: a quantity, and where it belongs. `route`: whose it is, of those in `at` their order, and
`inherits`: what it is where neither the pod nor the route says. `expression`: the default in CEL.
*/}}
{{- define "aegis.choices" -}}
{{- $sidecar := include "aegis.sidecar" . | fromYaml }}
{{- if $sidecar.routes }}
{{- $names := list }}
{{- range $sidecar.routes }}{{ $names = append $names .name }}{{ end }}
- {annotation: routes, kind: routes, variable: routeNames, default: {{ join "," $names | toJson }}}
{{- else }}
{{- include "aegis.backend-choices" (dict "annotation" "" "variable" "" "values" $sidecar "more" dict) }}
- {annotation: socket-file, kind: socket-file, variable: socketFile, value: socket.file, default: {{ include "aegis-sidecar.socket-file" (omit $sidecar "name") | toJson }}}
{{- end }}
- {annotation: socket-folder, kind: socket-folder, variable: socketFolder, value: socket.folder, default: {{ toJson $sidecar.socket.folder }}}
- {annotation: protocol, kind: protocol, variable: protocol, value: protocol, default: {{ $sidecar.protocol }}}
- {annotation: pool-mode, kind: pool-mode, variable: poolMode, value: pool.mode, default: {{ $sidecar.pool.mode | toJson }}, expression: {{ include "aegis.pool-mode-in-cel" (list $sidecar.pool.mode "protocol") | toJson }}}
- {annotation: balance, kind: balance, variable: balance, value: balance, default: {{ $sidecar.balance }}}
- {annotation: queue-timeout, kind: duration, variable: queueTimeout, value: queue.timeout, default: {{ $sidecar.queue.timeout }}}
- {annotation: request-timeout, kind: duration, variable: requestTimeout, value: requestTimeout, default: {{ toJson $sidecar.requestTimeout }}}
- {annotation: connect-timeout, kind: duration, variable: connectTimeout, value: connectTimeout, default: {{ $sidecar.connectTimeout }}}
- {annotation: tcp-user-timeout, kind: duration, variable: tcpUserTimeout, value: tcpUserTimeout, env: AEGIS_TCP_USER_TIMEOUT, default: {{ toJson $sidecar.tcpUserTimeout }}}
- {annotation: backend-drain, kind: duration, variable: backendDrain, value: backendDrain, env: AEGIS_BACKEND_DRAIN, default: {{ toJson $sidecar.backendDrain }}}
- {annotation: failback-time, kind: duration, variable: failbackTime, value: failbackTime, env: AEGIS_FAILBACK_TIME, default: {{ toJson $sidecar.failbackTime }}}
- {annotation: check-interval, kind: duration, variable: checkInterval, value: check.interval, env: AEGIS_CHECK_INTERVAL, default: {{ toJson $sidecar.check.interval }}}
- {annotation: log-level, kind: log-level, variable: logLevel, value: log, default: {{ toJson $sidecar.log }}}
- {annotation: image, kind: image, variable: image, value: image.name, default: {{ printf "%s:%s" $sidecar.image.repository $sidecar.image.tag | toJson }}}
{{- range $kind := list "requests" "limits" }}
{{- range $name := list "cpu" "memory" }}
{{- $amount := get (get $sidecar.resources $kind | default dict) $name }}
- {annotation: {{ $name }}-{{ trimSuffix "s" $kind }}, kind: amount, variable: {{ $name }}{{ trimSuffix "s" $kind | title }}, amount: [{{ $kind }}, {{ $name }}], default: {{ $amount | default "" | toString | toJson }}}
{{- end }}
{{- end }}
{{- range $at, $route := $sidecar.routes }}
{{- include "aegis.route-choices" (list $at $route $sidecar) }}
{{- end }}
{{- end }}

{{- /* Where connections go: what its annotations and variables begin with, whose values, and what to add to each. */}}
{{- define "aegis.backend-choices" -}}
{{- $backend := .values.backend }}
{{- if not $backend.addresses }}
{{- $rows := dict "namespace" (dict "variable" "backendNamespace" "default" $backend.namespace) "port" (dict "variable" "port" "default" ($backend.port | default "auto" | toString)) }}
{{- if not $backend.selector }}{{ $_ := set $rows "service" (dict "variable" "service" "default" ($backend.service | default "")) }}{{ end }}
{{- range $kind := list "service" "namespace" "port" }}
{{- with get $rows $kind }}
- {{ merge (dict "annotation" (print $.annotation $kind) "kind" $kind "variable" (print $.variable .variable) "value" (print "backend." $kind) "default" .default "namespace" $backend.namespace) $.more | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Those of a route: its place, the route and all values. */}}
{{- define "aegis.route-choices" -}}
{{- $route := index . 1 }}
{{- $sidecar := index . 2 }}
{{- $annotation := printf "%s." $route.name }}
{{- $variable := printf "route_%s_" ($route.name | replace "-" "_") }}
{{- $more := dict "route" $route.name "at" (index . 0) }}
{{- include "aegis.backend-choices" (dict "annotation" $annotation "variable" $variable "values" $route "more" $more) }}
- {{ merge (dict "annotation" (print $annotation "socket-file") "kind" "socket-file" "variable" (print $variable "socketFile") "value" "socket.file" "default" (include "aegis-sidecar.socket-file" $route)) $more | toJson }}
{{- range $row := include "aegis.inherited-choices" . | fromYamlArray }}
{{- $value := $route }}
{{- range splitList "." $row.value }}{{ $value = get ($value | default dict) . }}{{ end }}
{{- $expression := $value | toString | toJson }}
{{- if eq $row.kind "pool-mode" }}
{{- $expression = include "aegis.pool-mode-in-cel" (list ($value | default $sidecar.pool.mode) (print $variable "protocol")) }}
{{- if not $value }}{{ $_ := set $row "also" $row.annotation }}{{ end }}
{{- else if not $value }}
{{- $expression = printf "variables.%s" $row.variable }}
{{- end }}
{{- if not (or $value (and (has $row.kind (list "protocol" "pool-mode")) (or $route.protocol $route.pool))) }}
{{- $_ := set $row "env" (printf "AEGIS_%s__%s" ($route.name | upper | replace "-" "_") $row.of) }}
{{- $_ := set $row "inherits" $row.variable }}
{{- end }}
- {{ merge (dict "annotation" (print $annotation $row.annotation) "variable" (print $variable $row.variable) "expression" $expression) $row $more | toJson }}
{{- end }}
{{- end }}

{{- /* What a route has of all, unless of its own. */}}
{{- define "aegis.inherited-choices" -}}
- {annotation: protocol, kind: protocol, variable: protocol, value: protocol, of: PROTOCOL}
- {annotation: pool-mode, kind: pool-mode, variable: poolMode, value: pool.mode, of: POOL_MODE}
- {annotation: balance, kind: balance, variable: balance, value: balance, of: BALANCE}
- {annotation: queue-timeout, kind: duration, variable: queueTimeout, value: queue.timeout, of: QUEUE_TIMEOUT}
- {annotation: request-timeout, kind: duration, variable: requestTimeout, value: requestTimeout, of: REQUEST_TIMEOUT}
- {annotation: connect-timeout, kind: duration, variable: connectTimeout, value: connectTimeout, of: CONNECT_TIMEOUT}
- {annotation: tcp-user-timeout, kind: duration, variable: tcpUserTimeout, value: tcpUserTimeout, of: TCP_USER_TIMEOUT}
- {annotation: backend-drain, kind: duration, variable: backendDrain, value: backendDrain, of: BACKEND_DRAIN}
- {annotation: failback-time, kind: duration, variable: failbackTime, value: failbackTime, of: FAILBACK_TIME}
- {annotation: check-interval, kind: duration, variable: checkInterval, value: check.interval, of: CHECK_INTERVAL}
{{- end }}

{{- /* The pool mode that is set, or else the one that suits a protocol, which is in a variable. */}}
{{- define "aegis.pool-mode-in-cel" -}}
{{- if index . 0 }}{{ index . 0 | toJson }}{{ else }}variables.{{ index . 1 }} == "tcp" ? "preconnect" : "request"{{ end }}
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
{{- $looked := list }}
{{- range list .annotation .also | compact }}
{{- $looked = append $looked (printf "variables.annotations[?%s]" (printf "%s/%s" $prefix . | toJson)) }}
{{- $looked = append $looked (printf "variables.annotations[?%s]" (printf "aegis-proxy.io/%s" . | toJson)) }}
{{- end }}
- name: {{ .variable }}
  expression: >-
    {{ first $looked }}
    {{- range rest $looked }}.or(
    {{ . }})
    {{- end }}.orValue({{ .expression | default (toJson .default) }})
{{- end }}
{{- if (include "aegis.sidecar" . | fromYaml).routes }}
- name: routes
  expression: variables.routeNames.split(",").map(route, route.trim())
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
{{- $ports := list }}
{{- range include "aegis.routes" . | fromYamlArray }}{{ $ports = append $ports (int .listenPort) }}{{ end }}
{{- $ports = append $ports (int $sidecar.adminPort) }}
{{- $ports_text := printf "%s or %d" (initial $ports | join ", ") (last $ports) }}
{{- $known := include "aegis.annotations" . | fromYamlArray }}
{{- $plain := list }}
{{- $of_routes := list }}
{{- range $known }}
{{- if contains "." . }}{{ $of_routes = append $of_routes (splitList "." . | last) }}{{ else }}{{ $plain = append $plain . }}{{ end }}
{{- end }}
{{- $listening := `e.name.startsWith("AEGIS_") && e.name.endsWith("LISTEN") && variables.ports.exists(p, e.?value.orValue("").endsWith(":" + string(p)))` }}
{{- $port_users := printf `c.?ports.orValue([]).exists(p, p.?protocol.orValue("TCP") == "TCP" && p.containerPort in variables.ports) || c.?env.orValue([]).exists(e, %s)` $listening }}
{{- $volumes := list }}
{{- range list "token" "state" "unix" }}{{ $volumes = append $volumes (printf "%s-%s" $sidecar.name .) }}{{ end }}
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
    variables.injected || !object.spec.?volumes.orValue([]).exists(v, v.name in {{ toJson $volumes }})
  what: a volume of the pod is called {{ initial $volumes | join ", " }} or {{ last $volumes }}, as the sidecar's are
  change: rename it, or set sidecar.name in the chart's values
- expression: >-
    !variables.others.exists(c, {{ $port_users }})
  what: a container that has a port of the sidecar, {{ $ports_text }}, too
  is: >-
    variables.others.filter(c, {{ $port_users }}).map(c, c.name).join(", ")
  change: change it there, or set {{ empty $sidecar.routes | ternary "sidecar.listenPort" "listenPort of the route" }} and sidecar.adminPort of the release {{ .Release.Name }}
- expression: {{ printf "%s.size() == 0" $unknown | toJson }}
  what: unknown annotation
  verb: ""
  is: {{ printf `%s.join(", ")` $unknown | toJson }}
  change: "remove it. There are {{ initial $plain | join ", " }} and {{ last $plain }}{{ if $of_routes }}, and with a route and a dot in front {{ $of_routes | uniq | join ", " }}{{ end }}"
{{- if $sidecar.routes }}
{{- $names := list }}
{{- range $sidecar.routes }}{{ $names = append $names .name }}{{ end }}
- expression: >-
    variables.routeNames.size() <= 1024 &&
    variables.routes.all(r, r in {{ toJson $names }} && variables.routes.filter(other, other == r).size() == 1)
  what: the annotation aegis-proxy.io/routes
  is: variables.routeNames
  change: set it to some of {{ join "," $names }}, each once, with commas between
{{- $idle := printf `variables.annotations.filter(a, (a.startsWith("aegis-proxy.io/") || a.startsWith("%s/")) && %s.exists(r, a.contains("/" + r + ".") && !(r in variables.routes)))` $ours (toJson $names) }}
- expression: >-
    {{ $idle }}.size() == 0
  what: annotation for a route that the pod does not have
  verb: ""
  is: >-
    {{ $idle }}.join(", ")
  change: remove it, or name the route in the annotation aegis-proxy.io/routes, too
{{- end }}
{{- if $sidecar.routes }}
{{- $files := list }}
{{- range include "aegis.choices" . | fromYamlArray }}
{{- if and .route (eq .kind "socket-file") }}
{{- $files = append $files (printf "(%s in variables.routes ? [variables.%s] : [])" (toJson .route) .variable) }}
{{- end }}
{{- end }}
- expression: >-
    variables.socketFolder == "" || [{{ join " + " $files }}].all(files, files.all(f, f.size() > 40 || files.filter(other, other == f).size() == 1))
  what: two routes have the same socket file
  change: set the annotation aegis-proxy.io/ROUTE.socket-file of one of them to another name
{{- end }}
{{- if gt (len $sidecar.routes) (include "aegis-sidecar.routes-max" 3 | int) }}
- expression: variables.socketFolder == "" || variables.routes.size() <= {{ include "aegis-sidecar.routes-max" 3 }}
  what: with a socket folder a sidecar has {{ include "aegis-sidecar.routes-max" 3 }} routes at most, and there are
  verb: ""
  is: string(variables.routes.size())
  change: set the annotation aegis-proxy.io/routes to fewer, or aegis-proxy.io/socket-folder to ""
{{- end }}
{{- $mounting := `c.?volumeMounts.orValue([]).exists(m, m.mountPath in [variables.socketFolder, variables.socketFolder + "/"] && m.name != ` }}
{{- $mounting = printf "%s%s)" $mounting (last $volumes | toJson) }}
- expression: >-
    variables.socketFolder == "" || !variables.others.exists(c, {{ $mounting }})
  what: a container that mounts something else where the sidecar's sockets are to be
  is: >-
    variables.others.filter(c, {{ $mounting }}).map(c, c.name).join(", ")
  change: set the annotation aegis-proxy.io/socket-folder to another folder
{{- range $choice := include "aegis.choices" . | fromYamlArray }}
{{- $unless := list }}
{{- if .route }}{{ $unless = append $unless (printf `!(%s in variables.routes)` (toJson .route)) }}{{ end }}
{{- range include "aegis.choice-rules" (list $choice $sidecar) | fromYamlArray }}
{{- $rule := . }}
{{- $skips := $unless }}
{{- if and $choice.inherits (not .crosses) }}{{ $skips = append $skips (printf "variables.%s == variables.%s" $choice.variable $choice.inherits) }}{{ end }}
{{- if $skips }}{{ $_ := set $rule "expression" (printf "%s || (%s)" (join " || " $skips) .expression) }}{{ end }}
{{- if not (and .crosses $sidecar.routes (not $choice.route)) }}
- {{ toJson $rule }}
{{- end }}
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

{{- /* What has to hold of a choice of the pod's: the row, and the sidecar's values. `crosses`: what has to go together. */}}
{{- define "aegis.choice-rules" -}}
{{- $sidecar := index . 1 }}
{{- with index . 0 }}
{{- $route := "" }}
{{- $variables := "variables." }}
{{- $prefix := "AEGIS_" }}
{{- if .route }}
{{- $route = printf "%s." .route }}
{{- $prefix = include "aegis-sidecar.route-prefix" (dict "name" .route) }}
{{- $variables = printf "variables.route_%s_" (.route | replace "-" "_") }}
{{- end }}
{{- $annotation := "the annotation aegis-proxy.io/" }}
{{- $name := `matches("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")` }}
{{- $x := printf "variables.%s" .variable }}
{{- $values := $sidecar }}
{{- if .route }}{{ $values = include "aegis-sidecar.of-route" (list $sidecar (index $sidecar.routes (int .at))) | fromYaml }}{{ end }}
{{- $duration := get (include "aegis-sidecar.durations" . | fromYaml) (.value | default "") }}
{{- if eq .kind "service" }}
- expression: {{ $x }} != ""
  what: no backend
  change: set {{ $annotation }}{{ .annotation }} to the name of a Service in the namespace {{ .namespace }}
- expression: {{ $x }} == "" || {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && {{ $x }} != "none"
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to the name of a Service, without its namespace, of lower-case letters, digits and dashes, 63 at most
{{- else if eq .kind "namespace" }}
- expression: {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && {{ $x }} != "auto"
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to the name of the Service's namespace
{{- else if eq .kind "port" }}
- expression: {{ $x }}.size() <= 63 && {{ $x }}.{{ $name }} && ({{ $x }}.matches("[a-z]") || {{ $x }}.matches("^[0-9]{1,5}$") && int({{ $x }}) >= 1 && int({{ $x }}) <= 65535)
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to the name of the Service's port, or to a number from 1 to 65535
{{- else if eq .kind "protocol" }}
- expression: {{ $x }} in ["tcp", "chronos", "http1"]
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to tcp, chronos or http1
{{- if eq $values.check.kind "request" }}
- expression: {{ $x }} != "tcp" || {{ $variables }}checkInterval in ["", "off"]
  crosses: true
  what: the sidecar checks by request, for which only chronos and http1 have one, and the protocol
  is: {{ $x }}
  change: set {{ $annotation }}{{ $route }}protocol to chronos or http1, or aegis-proxy.io/{{ $route }}check-interval to off
{{- end }}
{{- else if eq .kind "pool-mode" }}
- expression: {{ $x }} in ["preconnect", "session", "request"]
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to preconnect, session or request
- expression: {{ $variables }}protocol != "tcp" || !({{ $x }} in ["session", "request"])
  crosses: true
  what: the protocol is tcp, whose bytes nobody can tell apart, and the pool mode
  is: {{ $x }}
  change: set {{ $annotation }}{{ $route }}pool-mode to preconnect, or aegis-proxy.io/{{ $route }}protocol to chronos or http1
{{- with include "aegis-sidecar.header" (list $values $prefix) }}
- expression: {{ $x }} == "preconnect"
  crosses: true
  what: {{ printf "in the chart's values %s: it names one client, and many share a connection; the pool mode" . | toJson }}
  is: {{ $x }}
  change: set {{ $annotation }}{{ $route }}pool-mode to preconnect
{{- end }}
{{- with include "aegis-sidecar.odd-sizes" (list $values $prefix) }}
- expression: {{ $x }} != "request"
  crosses: true
  what: {{ printf "in the chart's values %s; or choose another pool mode, which" . | toJson }}
  is: {{ $x }}
  change: set {{ $annotation }}{{ $route }}pool-mode to preconnect
{{- end }}
{{- else if eq .kind "balance" }}
- expression: {{ $x }} in ["least_conn", "round_robin", "random_two", "peak_ewma", "source_hash", "key_hash"]
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to least_conn, round_robin, random_two, peak_ewma, source_hash or key_hash
- expression: {{ $x }} != "key_hash" || {{ $variables }}protocol == "chronos" && {{ $variables }}poolMode == "request"
  crosses: true
  what: balancing by key_hash needs the protocol chronos and the pool mode request, and what there
  is: {{ $variables }}protocol + " and " + {{ $variables }}poolMode
  change: remove the annotations aegis-proxy.io/{{ $route }}protocol and aegis-proxy.io/{{ $route }}pool-mode, or set aegis-proxy.io/{{ $route }}balance to least_conn
{{- with include "aegis-sidecar.tiers" $values }}
- expression: {{ $x }} != "key_hash"
  crosses: true
  what: in the chart's values {{ . }}, no store has the keys of another one, and the balance
  is: {{ $x }}
  change: set {{ $annotation }}{{ $route }}balance to least_conn
{{- end }}
{{- else if eq .kind "socket-folder" }}
- expression: >-
    {{ $x }} == "" || {{ $x }}.size() <= 64 && {{ $x }}.matches("^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$") &&
    !{{ include "aegis-sidecar.taken-folders" . | fromYamlArray | toJson }}.exists(taken,
    ({{ $x }} + "/").startsWith(taken + "/") || (taken + "/").startsWith({{ $x }} + "/"))
  first: true
  what: {{ $annotation }}socket-folder
  is: {{ $x }}
  change: set it to a path such as /run/db, 64 letters at most, where the sidecar has nothing else
{{- else if eq .kind "socket-file" }}
- expression: {{ $x }}.size() <= 40 && {{ $x }}.matches("^[.]?[A-Za-z0-9_-][A-Za-z0-9._-]*$")
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to the name of a file such as db.sock, 40 letters at most
{{- else if eq .kind "log-level" }}
- expression: >-
    {{ $x }}.size() <= 1024 &&
    {{ $x }}.matches("^([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace)(,([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace))*$")
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to off, error, warn, info, debug or trace
{{- else if eq .kind "image" }}
{{- $part := "[a-z0-9]+([._-]+[a-z0-9]+)*" }}
- expression: >-
    {{ $x }}.size() <= 512 && {{ $x }}.matches("^([A-Za-z0-9.-]+(:[0-9]+)?/)?{{ $part }}(/{{ $part }})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$")
  first: true
  what: {{ $annotation }}{{ .annotation }}
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
    {{ if and .env (not .route) }}{{ $x }} == "" || {{ end }}{{ include "aegis.cel-duration" (list .variable $duration) | nindent 4 | trim }}
  what: {{ $annotation }}{{ .annotation }}
  is: {{ $x }}
  change: set it to {{ include "aegis-sidecar.accepted" $duration }}
{{- end }}
{{- end }}
{{- end }}

{{- /*
Mounts the sockets' folder in the containers of a kind, as patches: all that are there before the sidecar, but
for other sidecars and those that mount something there already, which the other policy refuses.
*/}}
{{- define "aegis.mounts-in-cel" -}}
{{- $kind := index . 0 -}}
{{- $mount := include "aegis-sidecar.cel" (list (printf "Object.spec.%s.volumeMounts" $kind) (index . 1)) -}}
{{- $each := printf "object.spec.?%s.orValue([]).transformList(i, c, !%s" $kind (include "aegis.is-a-sidecar" .) -}}
{{- $path := printf `"/spec/%s/" + string(i) + "/volumeMounts` $kind -}}
(variables.socketFolder == "" ? [] :
{{ $each }} && !has(c.volumeMounts), JSONPatch{op: "add", path: {{ $path }}", value: []}) +
{{ $each }} && !c.?volumeMounts.orValue([]).exists(m, m.mountPath in [variables.socketFolder, variables.socketFolder + "/"]), JSONPatch{op: "add", path: {{ $path }}/-", value: {{ $mount }}})) +
{{- end }}
