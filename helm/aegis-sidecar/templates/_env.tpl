{{- /*
What the program would refuse of the values that it reads as texts of its own syntax, and of `env`, whose
variables have no value of their own here: a pod would only crash with them, though `helm install` was content.

What the kubelet puts in the place of `$(NAME)` is not known here.
*/}}
{{- define "aegis-sidecar.check-env" -}}
{{- $values := . }}
{{- $variables := include "aegis-sidecar.variables" . | fromYaml }}
{{- range $name, $text := .env }}
{{- $plain := $name }}
{{- range $prefix := include "aegis-sidecar.route-prefixes" $values | fromYamlArray }}
{{- if hasPrefix $prefix $name }}{{ $plain = print "AEGIS_" (trimPrefix $prefix $name) }}{{ end }}
{{- end }}
{{- $variable := get $variables $plain | default dict }}
{{- if not (eq $plain $name | ternary $variable.accepts $variable.ofRoutes) }}
{{- fail (printf "aegis-sidecar: env.%s: there is no such variable%s: correct its name, or remove it" $name (contains "__" $name | ternary " of a route" "")) }}
{{- end }}
{{- if not (or (contains "$(" $text) (include "aegis-sidecar.is-accepted" (list $plain ($text | trim) $variable))) }}
{{- fail (printf "aegis-sidecar: env.%s is %q: set it to %s" $name $text $variable.accepts) }}
{{- end }}
{{- end }}
{{- range include "aegis-sidecar.directives" .log | fromYamlArray }}
{{- fail (printf "aegis-sidecar: log has %s: there is no such module: name one of %s" . (include "aegis-sidecar.modules" $ | fromJsonArray | join ", ")) }}
{{- end }}
{{- end }}

{{- /* What does not go together with a variable of `env`: a route's values, and what its variables begin with. */}}
{{- define "aegis-sidecar.check-env-of-route" -}}
{{- $values := index . 0 }}
{{- $env := $values.env }}
{{- $names := dict }}
{{- range $name := list "PRESET" "CHECK" "CHECK_INTERVAL" "PROXY_PROTOCOL" "POOL_MIN_IDLE" "POOL_MAX_IDLE" "ENDPOINT_MAX" "KUBE_SERVICE" "KUBE_SELECTOR" "DISCOVERY" }}
{{- $own := print (index $ 1) $name }}
{{- $_ := set $names $name (hasKey $env $own | ternary $own (print "AEGIS_" $name)) }}
{{- end }}
{{- $check := $values.check | default dict }}
{{- $interval := get $env (print (index . 1) "CHECK_INTERVAL") | default $check.interval | default (get $env $names.CHECK_INTERVAL) | default "off" | trim }}
{{- $checks := not (has $interval (list "off" "false")) }}
{{- if and $checks (eq (get $env $names.PRESET | trim) "mysql") }}
{{- fail (printf "aegis-sidecar: check.interval is %s and env.%s is mysql: such a server counts connections without a login, until it locks the host out: set check.interval to off" $interval $names.PRESET) }}
{{- end }}
{{- $kind := eq (get $env $names.CHECK | trim) "request" | ternary (print "env." $names.CHECK) (eq ($check.kind | default "") "request" | ternary "check.kind" "") }}
{{- if and $checks $kind (eq $values.protocol "tcp") }}
{{- fail (printf "aegis-sidecar: %s is request and protocol is tcp: only chronos and http1 have a request for that: empty %s, or set protocol to chronos or http1" $kind $kind) }}
{{- end }}
{{- $mode := include "aegis-sidecar.pool-mode" $values }}
{{- with include "aegis-sidecar.header" (list $values (index . 1)) }}
{{- if ne $mode "preconnect" }}
{{- fail (printf "aegis-sidecar: %s and pool.mode is %s: the header names one client, and many share a connection: set pool.mode to preconnect, or that to off" . $mode) }}
{{- end }}
{{- end }}
{{- $numbers := dict }}
{{- range $name := list "POOL_MIN_IDLE" "POOL_MAX_IDLE" "ENDPOINT_MAX" }}
{{- with get $env (get $names $name) | trim }}{{ if regexMatch "^[0-9]{1,9}$" . }}{{ $_ := set $numbers $name (float64 . | int64) }}{{ end }}{{ end }}
{{- end }}
{{- if hasKey $numbers "POOL_MIN_IDLE" }}
{{- $min := get $numbers "POOL_MIN_IDLE" }}
{{- /* The default gives way to a preset's, and that to what is set. */}}
{{- $gives := has (get $env $names.PRESET | trim) (list "mysql" "postgres") }}
{{- $max := get $numbers "POOL_MAX_IDLE" | default (hasKey $numbers "POOL_MAX_IDLE" | ternary 0 ($gives | ternary $min 64)) }}
{{- if and (ne $mode "request") (gt $min ($max | int64)) }}
{{- fail (printf "aegis-sidecar: env.%s is %d and at most %d are kept: set it to %d or less, or env.%s to %d or more" $names.POOL_MIN_IDLE $min ($max | int64) ($max | int64) $names.POOL_MAX_IDLE $min) }}
{{- end }}
{{- if and (hasKey $numbers "ENDPOINT_MAX") (lt (get $numbers "ENDPOINT_MAX") $min) }}
{{- fail (printf "aegis-sidecar: env.%s is %d and env.%s is %d: set the former to at most the latter" $names.POOL_MIN_IDLE $min $names.ENDPOINT_MAX (get $numbers "ENDPOINT_MAX")) }}
{{- end }}
{{- end }}
{{- $decided := and $values.backend.addresses (hasKey $env $names.DISCOVERY) }}
{{- range $name := list "KUBE_SERVICE" "KUBE_SELECTOR" }}
{{- if and (include "aegis-sidecar.backend-kinds" $values) (not $decided) (not (has (get $env (get $names $name) | trim) (list "" "none"))) }}
{{- fail (printf "aegis-sidecar: %s and env.%s are set: keep one of them" (include "aegis-sidecar.backend-kinds" $values) (get $names $name)) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What a header for each client is set by, if one is: a route's values, and what its variables begin with. */}}
{{- define "aegis-sidecar.header" -}}
{{- $env := (index . 0).env }}
{{- $own := print (index . 1) "PROXY_PROTOCOL" }}
{{- $name := hasKey $env $own | ternary $own "AEGIS_PROXY_PROTOCOL" }}
{{- $header := get $env $name | trim }}
{{- if not (has $header (list "" "off" "false")) }}{{ printf "env.%s is %s" $name $header }}{{ end }}
{{- end }}

{{- /* What the variables of routes begin with, those included that have their names by a variable. */}}
{{- define "aegis-sidecar.route-prefixes" -}}
{{- $prefixes := list }}
{{- range .routes }}{{ $prefixes = append $prefixes (include "aegis-sidecar.route-prefix" .) }}{{ end }}
{{- range get .env "AEGIS_ROUTES" | default "" | splitList "," }}
{{- with trim . }}{{ $prefixes = append $prefixes (include "aegis-sidecar.route-prefix" (dict "name" .)) }}{{ end }}
{{- end }}
{{- toJson $prefixes }}
{{- end }}

{{- /* Whether the program takes it: the plain name of a variable, a text without spaces around it, and its row. */}}
{{- define "aegis-sidecar.is-accepted" -}}
{{- $text := index . 1 }}
{{- $variable := index . 2 }}
{{- $pattern := get (include "aegis-sidecar.patterns" . | fromYaml) (index . 0) }}
{{- if not $text }}
{{- if has (index . 0) (list "AEGIS_NODE_NAME" "AEGIS_ZONE" "AEGIS_REGION") }}true{{ end }}
{{- else if has (get (dict "true" "on" "false" "off") $text | default $text) ($variable.words | default list) -}}
true
{{- else if $variable.numbers }}
{{- if regexMatch "^[0-9]{1,20}$" $text }}
{{- if and (ge (float64 $text) (index $variable.numbers 0)) (le (float64 $text) (index $variable.numbers 1)) }}true{{ end }}
{{- end }}
{{- else if $variable.durations }}
{{- with include "aegis-sidecar.span" $text }}
{{- $whole := or (not $variable.wholeSeconds) (eq (mod (int64 (float64 .)) 1000) 0) }}
{{- if and $whole (ge (float64 .) (index $variable.durations 0)) (le (float64 .) (index $variable.durations 1)) }}true{{ end }}
{{- end }}
{{- else if $pattern }}
{{- if regexMatch $pattern $text }}true{{ end }}
{{- else if has (index . 0) (list "AEGIS_BACKENDS" "AEGIS_BACKUPS") }}
{{- $is_none := false }}
{{- range splitList "," $text }}
{{- if not (or (regexMatch "^unix:/.*[^/]$" (trim .)) (include "aegis-sidecar.address" (trim .))) }}{{ $is_none = true }}{{ end }}
{{- end }}
{{- if not $is_none }}true{{ end }}
{{- else if $variable.words }}
{{- else if not (eq (index . 0) "AEGIS_LOG") -}}
true
{{- else if not (include "aegis-sidecar.directives" $text | fromYamlArray) -}}
true
{{- end }}
{{- end }}

{{- /* A sum of times such as 1m 30s in milliseconds, or nothing where it is none. */}}
{{- define "aegis-sidecar.span" -}}
{{- $units := dict "ns" 0.000001 "us" 0.001 "ms" 1.0 "s" 1000.0 "m" 60000.0 "h" 3600000.0 "d" 86400000.0 "w" 604800000.0 "M" 2630016000.0 "y" 31557600000.0 }}
{{- $long := dict "nanos" "ns" "nsec" "ns" "usec" "us" "µs" "us" "micros" "us" "millis" "ms" "msec" "ms" "sec" "s" "secs" "s" "second" "s" "seconds" "s" "min" "m" "mins" "m" "minute" "m" "minutes" "m" "hr" "h" "hrs" "h" "hour" "h" "hours" "h" "day" "d" "days" "d" "week" "w" "weeks" "w" "wk" "w" "wks" "w" "month" "M" "months" "M" "year" "y" "years" "y" "yr" "y" "yrs" "y" }}
{{- $part := "[0-9]{1,18}([.][0-9]+)? *[a-zA-Zµ]+" }}
{{- if eq . "0" }}0{{ else if regexMatch (printf "^(%s *)+$" $part) . }}
{{- $sum := 0.0 }}
{{- range regexFindAll $part . -1 }}
{{- $unit := regexFind "[a-zA-Zµ]+$" . }}
{{- $sum = addf $sum (mulf (regexFind "^[0-9.]+" . | float64) (get $units (get $long $unit | default $unit) | default -1e300)) }}
{{- end }}
{{- if ge $sum 0.0 }}{{ $sum }}{{ end }}
{{- end }}
{{- end }}

{{- /* What texts of a syntax of their own look like. */}}
{{- define "aegis-sidecar.patterns" -}}
{{- $name := "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?" -}}
AEGIS_ROUTES: '^ *[a-z0-9]+(-[a-z0-9]+)*( *, *[a-z0-9]+(-[a-z0-9]+)*)*$'
AEGIS_SOCKET_MODE: '^0*[0-7]{1,3}$'
AEGIS_SOCKET_OWNER: '^([0-9]{1,10}(:[0-9]{1,10})?|:[0-9]{1,10})$'
AEGIS_KUBE_SERVICE: '^{{ $name }}([.]{{ $name }})?$'
AEGIS_KUBE_SELECTOR: '{{ include "aegis-sidecar.selector" . }}'
AEGIS_KUBE_NAMESPACE: '^{{ $name }}$'
AEGIS_KUBE_PORT: '^([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]|[a-z0-9-]*[a-z][a-z0-9-]*)$'
AEGIS_KUBE_SNAPSHOT: '^/.*[^/]$'
AEGIS_CHECK_PATH: '^/[!"$-~]{0,1000}[!"$-~]{0,23}$'
AEGIS_CONTROL: '^unix:/.{0,105}[^/]$'
{{- end }}

{{- /* The pattern of a label selector of Kubernetes. */}}
{{- define "aegis-sidecar.selector" -}}
{{- $part := "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?" -}}
{{- $key := printf "([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?%s" $part -}}
{{- $set := printf "[(] *(%s)?( *, *(%s)?)* *[)]" $part $part -}}
{{- $one := printf "(! *%s|%s( *(=|==|!=) *(%s)?| +(in|notin) *%s| *[<>] *[0-9]+)?)" $key $key $part $set -}}
^{{ $one }}( *, *{{ $one }})*$
{{- end }}

{{- /* The modules that a filter of the log names and that there are not. */}}
{{- define "aegis-sidecar.directives" -}}
{{- $modules := include "aegis-sidecar.modules" . | fromJsonArray -}}
{{- $unknown := list -}}
{{- range splitList "," . -}}
{{- $target := splitList "=" . | first | trim -}}
{{- $module := regexFind "^aegis::[^:]*" $target | trimPrefix "aegis::" -}}
{{- if and (hasPrefix "aegis::" $target) (ne $target "aegis::ends") (not (has $module $modules)) -}}
{{- $unknown = append $unknown $target -}}
{{- end -}}
{{- end -}}
{{ toJson $unknown }}
{{- end }}
