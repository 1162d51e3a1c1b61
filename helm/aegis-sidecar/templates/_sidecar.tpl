{{- /*
What a pod needs for Aegis, from the values of this chart: to include in your own pod's spec.

  initContainers:
    {{- include "aegis-sidecar.container" .Values.sidecar | nindent 8 }}
  containers:
    - name: web
      volumeMounts:
        {{- include "aegis-sidecar.socket-mount" .Values.sidecar | nindent 12 }}
  volumes:
    {{- include "aegis-sidecar.volume" .Values.sidecar | nindent 8 }}

Each gives a list, the one of mounts nothing without socket.folder. The sidecar comes first, so that it
serves those that follow it.
*/}}
{{- define "aegis-sidecar.container" -}}
{{- include "aegis-sidecar.check" . -}}
{{- list (include "aegis-sidecar.container-spec" . | fromYaml) | toYaml }}
{{- end }}

{{- define "aegis-sidecar.volume" -}}
{{- include "aegis-sidecar.volume-specs" . }}
{{- end }}

{{- /* What a container of the application mounts to connect by a Unix socket, which needs no right to write. */}}
{{- define "aegis-sidecar.socket-mount" -}}
{{- if .socket.folder -}}
- name: {{ include "aegis-sidecar.name" . }}-unix
  mountPath: {{ .socket.folder }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "aegis-sidecar.name" -}}
{{ .name | default "aegis" }}
{{- end }}

{{- /* Names of ports are few letters, and two sidecars of a pod must not share one: Prometheus goes by them. */}}
{{- define "aegis-sidecar.admin-port-name" -}}
{{ eq (int .adminPort) 8082 | ternary "aegis-admin" (printf "aegis-%d" (int .adminPort)) }}
{{- end }}

{{- /* The folder of the last endpoints, which outlives a restart of the container, and of the control socket. */}}
{{- define "aegis-sidecar.state-folder" -}}
{{- $backends := list .backend }}
{{- range .routes }}{{ $backends = append $backends (.backend | default dict) }}{{ end }}
{{- if .routes }}{{ $backends = rest $backends }}{{ end }}
{{- $by_kubernetes := false }}
{{- range $backends }}{{ if not .addresses }}{{ $by_kubernetes = true }}{{ end }}{{ end }}
{{- if or $by_kubernetes .control }}/run/aegis{{ end }}
{{- end }}

{{- /* Where the sockets are. A policy adds what belongs to that in the pods that choose a folder. */}}
{{- define "aegis-sidecar.socket-folder" -}}
{{- if not (hasPrefix "cel::" .socket.folder) }}{{ .socket.folder }}{{ end }}
{{- end }}

{{- define "aegis-sidecar.socket-file" -}}
{{- (.socket | default dict).file | default (printf "%s.sock" (.name | default "aegis")) }}
{{- end }}

{{- define "aegis-sidecar.container-spec" -}}
name: {{ include "aegis-sidecar.name" . }}
image: {{ .image.name | default (printf "%s:%s" .image.repository .image.tag) | toJson }}
imagePullPolicy: {{ .image.pullPolicy }}
restartPolicy: Always
env:
  {{- include "aegis-sidecar.env" . | nindent 2 }}
ports:
  - name: {{ include "aegis-sidecar.admin-port-name" . }}
    containerPort: {{ .adminPort }}
    protocol: TCP
startupProbe:
  # The answer is held until the sidecar is ready, 8 s at most: a probe that fails is asked again a
  # second later, which would be a second more of each start. So these are about a minute.
  {{- include "aegis-sidecar.probe" (list . "startupz" 1 8 10) | nindent 2 }}
livenessProbe:
  {{- include "aegis-sidecar.probe" (list . "livez" 10 3 2) | nindent 2 }}
{{- if .readiness }}
readinessProbe:
  {{- include "aegis-sidecar.probe" (list . "readyz" 5 2 2) | nindent 2 }}
{{- end }}
resources: {{ toJson .resources }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile:
    type: {{ .seccomp.type }}
    {{- if eq .seccomp.type "Localhost" }}
    localhostProfile: {{ toJson .seccomp.localhostProfile }}
    {{- end }}
# The last lines of the log, such as what is wrong with the configuration, show in the pod's status.
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  # Mounted here, the token is there also where the pod does not mount one by itself.
  - name: {{ include "aegis-sidecar.name" . }}-token
    mountPath: /var/run/secrets/kubernetes.io/serviceaccount
    readOnly: true
  {{- with include "aegis-sidecar.state-folder" . }}
  - name: {{ include "aegis-sidecar.name" $ }}-state
    mountPath: {{ . }}
  {{- end }}
  {{- if include "aegis-sidecar.socket-folder" . }}
  {{- include "aegis-sidecar.own-socket-mount" . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "aegis-sidecar.own-socket-mount" -}}
- name: {{ include "aegis-sidecar.name" . }}-unix
  mountPath: {{ toJson .socket.folder }}
{{- end }}

{{- define "aegis-sidecar.probe" -}}
{{- $values := index . 0 -}}
httpGet:
  path: /{{ index . 1 }}
  port: {{ $values.adminPort }}
periodSeconds: {{ index . 2 }}
failureThreshold: {{ index . 3 }}
timeoutSeconds: {{ index . 4 }}
{{- end }}

{{- /* The variables that the values stand for; `.env` adds others. */}}
{{- define "aegis-sidecar.env" -}}
{{- if .routes -}}
{{- $names := list }}
{{- range .routes }}{{ $names = append $names .name }}{{ end -}}
- {name: AEGIS_ROUTES, value: {{ join "," $names | toJson }}}
{{- range .routes }}
{{ include "aegis-sidecar.route-env" (list $ .) }}
{{- end }}
- {name: AEGIS_ADMIN, value: "[::]:{{ .adminPort }}"}
{{- else -}}
{{ include "aegis-sidecar.listen" (list "AEGIS_" .listenPort .socket.folder (include "aegis-sidecar.socket-file" (omit . "name"))) }}
- {name: AEGIS_ADMIN, value: "[::]:{{ .adminPort }}"}
{{ include "aegis-sidecar.backend-env" (list "AEGIS_" .backend "endpoints.json") }}
{{- end }}
{{- if include "aegis-sidecar.socket-folder" . }}
- {{ include "aegis-sidecar.socket-mode" . }}
{{- end }}
{{- if .control }}
- {name: AEGIS_CONTROL, value: "unix:{{ include "aegis-sidecar.state-folder" . }}/control.sock"}
{{- end }}
- {name: AEGIS_PROTOCOL, value: {{ toJson .protocol }}}
- {name: AEGIS_POOL_MODE, value: {{ include "aegis-sidecar.pool-mode" . | toJson }}}
- {name: AEGIS_POOL_SIZE, value: {{ int .pool.size | toString | toJson }}}
- {name: AEGIS_QUEUE_MAX, value: {{ int .queue.max | toString | toJson }}}
- {name: AEGIS_QUEUE_TIMEOUT, value: {{ toJson .queue.timeout }}}
- {name: AEGIS_REQUEST_TIMEOUT, value: {{ toJson .requestTimeout }}}
- {name: AEGIS_CONNECT_TIMEOUT, value: {{ toJson .connectTimeout }}}
{{- range $name, $variable := include "aegis-sidecar.optional" . | fromYaml }}
{{- with include "aegis-sidecar.value" (list $ $name) }}
- {name: {{ $variable }}, value: {{ toJson . }}}
{{- end }}
{{- end }}
- {name: AEGIS_BALANCE, value: {{ toJson .balance }}}
{{- if ne (toString .stores) "auto" }}
- {name: AEGIS_KUBE_STORES, value: {{ int .stores | toString | toJson }}}
{{- end }}
{{- $localities := list .locality }}
{{- range .routes }}{{ $localities = append $localities (.locality | default "off") }}{{ end }}
{{- if ne .locality "off" }}
- {name: AEGIS_LOCALITY, value: {{ .locality }}}
{{- end }}
{{- if without $localities "off" }}
- {name: AEGIS_NODE_NAME, valueFrom: {fieldRef: {apiVersion: v1, fieldPath: spec.nodeName}}}
{{- if or (has "zone" $localities) (has "failover" $localities) }}
- name: AEGIS_ZONE
  valueFrom: {fieldRef: {apiVersion: v1, fieldPath: "metadata.labels['topology.kubernetes.io/zone']"}}
{{- end }}
{{- if has "failover" $localities }}
- name: AEGIS_REGION
  valueFrom: {fieldRef: {apiVersion: v1, fieldPath: "metadata.labels['topology.kubernetes.io/region']"}}
{{- end }}
{{- end }}
- {name: AEGIS_DRAIN_DELAY, value: {{ .drain.delay }}}
- {name: AEGIS_DRAIN_TIMEOUT, value: {{ .drain.timeout }}}
- {name: AEGIS_LOG, value: {{ toJson .log }}}
{{- if .workers }}
- {name: AEGIS_WORKERS, value: {{ .workers | toString | toJson }}}
{{- else }}
- {name: AEGIS_WORKERS, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: "1"}}}
{{- end }}
{{- /* Without a limit the kubelet would fill in what the node has. */}}
{{- range $kind := list "requests" "limits" }}
{{- range $name := list "cpu" "memory" }}
{{- if hasKey (get $.resources $kind | default dict) $name }}
- {{ include "aegis-sidecar.amount" (list $kind $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $value := .env }}
- {name: {{ $name }}, value: {{ toJson $value }}}
{{- end }}
{{- end }}

{{- /* Where clients connect. What variables begin with, the port of loopback, the sockets' folder and a file. */}}
{{- define "aegis-sidecar.listen" -}}
{{- $loopback := printf "127.0.0.1:%d,[::1]:%d" (int (index . 1)) (int (index . 1)) -}}
{{- $folder := index . 2 -}}
{{- $file := index . 3 -}}
{{- $value := $loopback -}}
{{- if hasPrefix "cel::" $folder -}}
{{- $folder = trimPrefix "cel::" $folder -}}
{{- $file = include "aegis-sidecar.cel" (list "" $file) -}}
{{- $value = printf `cel::(%s == "" ? "" : "unix:" + %s + "/" + %s + ",") + %s` $folder $folder $file (toJson $loopback) -}}
{{- else if $folder -}}
{{- $value = printf "unix:%s/%s,%s" $folder $file $loopback -}}
{{- end -}}
- {name: {{ index . 0 }}LISTEN, value: {{ toJson $value }}}
{{- end }}

{{- define "aegis-sidecar.socket-mode" -}}
{name: AEGIS_SOCKET_MODE, value: {{ toJson .socket.mode }}}
{{- end }}

{{- /* Where connections go. What variables begin with, the value `backend`, and a file for the endpoints. */}}
{{- define "aegis-sidecar.backend-env" -}}
{{- $prefix := index . 0 -}}
{{- $file := index . 2 -}}
{{- with index . 1 -}}
{{- if .addresses -}}
- {name: {{ $prefix }}BACKENDS, value: {{ toJson .addresses }}}
{{- with .backups }}
- {name: {{ $prefix }}BACKUPS, value: {{ toJson . }}}
{{- end }}
{{- else -}}
- {name: {{ $prefix }}DISCOVERY, value: kubernetes}
{{- if .selector }}
- {name: {{ $prefix }}KUBE_SELECTOR, value: {{ toJson .selector }}}
{{- else }}
- {name: {{ $prefix }}KUBE_SERVICE, value: {{ toJson .service }}}
{{- end }}
{{- if .namespace }}
- {name: {{ $prefix }}KUBE_NAMESPACE, value: {{ toJson .namespace }}}
{{- else }}
- {name: {{ $prefix }}KUBE_NAMESPACE, valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}}
{{- end }}
- {name: {{ $prefix }}KUBE_PORT, value: {{ .port | default "auto" | toString | toJson }}}
- {name: {{ $prefix }}KUBE_SNAPSHOT, value: /run/aegis/{{ $file }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* What a route's own variables begin with. */}}
{{- define "aegis-sidecar.route-prefix" -}}
AEGIS_{{ .name | upper | replace "-" "_" }}__
{{- end }}

{{- /* A route's own variables: those of the values that it has itself. All values, and the route. */}}
{{- define "aegis-sidecar.route-env" -}}
{{- $route := index . 1 -}}
{{- $prefix := include "aegis-sidecar.route-prefix" $route -}}
{{ include "aegis-sidecar.listen" (list $prefix $route.listenPort (index . 0).socket.folder (include "aegis-sidecar.socket-file" $route)) }}
{{ include "aegis-sidecar.backend-env" (list $prefix $route.backend (printf "endpoints-%s.json" $route.name)) }}
{{- if or $route.protocol $route.pool }}
- {name: {{ $prefix }}PROTOCOL, value: {{ (include "aegis-sidecar.of-route" . | fromYaml).protocol | toJson }}}
- {name: {{ $prefix }}POOL_MODE, value: {{ include "aegis-sidecar.pool-mode" (include "aegis-sidecar.of-route" . | fromYaml) | toJson }}}
{{- end }}
{{- range $name, $variable := include "aegis-sidecar.of-routes" . | fromYaml }}
{{- with include "aegis-sidecar.value" (list $route $name) }}
- {name: {{ $prefix }}{{ $variable }}, value: {{ toJson . }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* A value as the program takes it: all values, and its name, with dots. */}}
{{- define "aegis-sidecar.value" -}}
{{- $value := index . 0 }}
{{- range splitList "." (index . 1) }}{{ $value = get ($value | default dict) . }}{{ end }}
{{- kindIs "float64" $value | ternary (int64 $value | toString) (toString $value) }}
{{- end }}

{{- /* The values of a route that need no more than to be written down. */}}
{{- define "aegis-sidecar.of-routes" -}}
pool.size: POOL_SIZE
queue.max: QUEUE_MAX
queue.timeout: QUEUE_TIMEOUT
requestTimeout: REQUEST_TIMEOUT
connectTimeout: CONNECT_TIMEOUT
tcpUserTimeout: TCP_USER_TIMEOUT
backendDrain: BACKEND_DRAIN
failbackTime: FAILBACK_TIME
check.interval: CHECK_INTERVAL
check.kind: CHECK
check.path: CHECK_PATH
check.fall: CHECK_FALL
check.rise: CHECK_RISE
balance: BALANCE
stores: KUBE_STORES
locality: LOCALITY
{{- end }}

{{- /* The values as they are for a route: all values, and the route, which has not what is empty. */}}
{{- define "aegis-sidecar.of-route" -}}
{{- $route := deepCopy (index . 1) -}}
{{- range $values := list $route $route.check $route.pool -}}
{{- range $name, $value := $values }}{{ if eq (toString $value) "" }}{{ $_ := unset $values $name }}{{ end }}{{ end -}}
{{- end -}}
{{- mergeOverwrite (omit (deepCopy (index . 0)) "routes" "backend") $route | toYaml }}
{{- end }}

{{- /* What tells the program how much CPU or memory its container has. */}}
{{- define "aegis-sidecar.amount" -}}
{{- $kind := index . 0 -}}
{{- $name := index . 1 -}}
{{- $variable := printf "AEGIS_%s_%s" (upper $name) (trimSuffix "s" $kind | upper) -}}
{{- $divisor := eq $name "cpu" | ternary "1m" "1" -}}
{name: {{ $variable }}, valueFrom: {resourceFieldRef: {resource: {{ $kind }}.{{ $name }}, divisor: {{ toJson $divisor }}}}}
{{- end }}

{{- /* The values that are the program's own choice where they are empty. */}}
{{- define "aegis-sidecar.optional" -}}
backendDrain: AEGIS_BACKEND_DRAIN
failbackTime: AEGIS_FAILBACK_TIME
check.interval: AEGIS_CHECK_INTERVAL
check.kind: AEGIS_CHECK
check.path: AEGIS_CHECK_PATH
check.fall: AEGIS_CHECK_FALL
check.rise: AEGIS_CHECK_RISE
startTimeout: AEGIS_START_TIMEOUT
tcpUserTimeout: AEGIS_TCP_USER_TIMEOUT
{{- end }}

{{- define "aegis-sidecar.pool-mode" -}}
{{ .pool.mode | default (eq .protocol "tcp" | ternary "preconnect" "request") }}
{{- end }}

{{- define "aegis-sidecar.volume-specs" -}}
- name: {{ include "aegis-sidecar.name" . }}-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
      - downwardAPI: {items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]}
{{- if include "aegis-sidecar.state-folder" . }}
# No limit of its size: the kubelet evicts the pod of a volume that is over one.
- name: {{ include "aegis-sidecar.name" . }}-state
  emptyDir: {}
{{- end }}
{{- if include "aegis-sidecar.socket-folder" . }}
{{ include "aegis-sidecar.socket-volume" . }}
{{- end }}
{{- end }}

{{- define "aegis-sidecar.socket-volume" -}}
- name: {{ include "aegis-sidecar.name" . }}-unix
  emptyDir: {}
{{- end }}

{{- /* Refuses what no schema can refuse with a message that helps. */}}
{{- define "aegis-sidecar.check" -}}
{{- include "aegis-sidecar.check-options" . }}
{{- range $route := .routes }}
{{- if not (include "aegis-sidecar.backend-kinds" $route) }}
{{- fail (printf "aegis-sidecar: route %s has no backend: set one of backend.service, backend.selector and backend.addresses" $route.name) }}
{{- end }}
{{- end }}
{{- if not (or .routes (include "aegis-sidecar.backend-kinds" .)) }}
{{- fail "aegis-sidecar: no backend: set one of backend.service, backend.selector and backend.addresses" }}
{{- end }}
{{- end }}

{{- /* Puts what is empty in the place of what a null has removed. */}}
{{- define "aegis-sidecar.fill" -}}
{{- range $name := list "env" "check" }}{{ if not (get $ $name) }}{{ $_ := set $ $name dict }}{{ end }}{{ end }}
{{- if not .routes }}{{ $_ := set . "routes" list }}{{ end }}
{{- range $name := list "workers" "tcpUserTimeout" "backendDrain" "failbackTime" "startTimeout" "pool.mode" "socket.folder" "socket.file" "check.interval" "check.kind" "check.path" "check.fall" "check.rise" }}
{{- $place := contains "." $name | ternary (get $ (splitList "." $name | first)) $ }}
{{- $last := splitList "." $name | last }}
{{- if not (get $place $last) }}{{ $_ := set $place $last "" }}{{ end }}
{{- end }}
{{- end }}

{{- /* The same where the service may come later, by annotation. */}}
{{- define "aegis-sidecar.check-options" -}}
{{- include "aegis-sidecar.fill" . }}
{{- if .routes }}
{{- include "aegis-sidecar.check-routes" . }}
{{- else }}
{{- include "aegis-sidecar.check-env-of-route" (list . "AEGIS_") }}
{{- include "aegis-sidecar.check-sizes" (list . "AEGIS_") }}
{{- end }}
{{- include "aegis-sidecar.check-route" . }}
{{- include "aegis-sidecar.check-env" . }}
{{- $folder := .socket.folder }}
{{- range include "aegis-sidecar.taken-folders" . | fromYamlArray }}
{{- $taken := printf "%s/" . }}
{{- $chosen := printf "%s/" $folder }}
{{- if and $folder (or (hasPrefix $taken $chosen) (hasPrefix $chosen $taken)) }}
{{- fail (printf "aegis-sidecar: socket.folder is %s, where the sidecar has something else: set it to another one, such as /run/db" $folder) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Folders in which the sidecar has something else. */}}
{{- define "aegis-sidecar.taken-folders" -}}
- /run/aegis
- /var/run/secrets/kubernetes.io/serviceaccount
- /usr/local/bin
{{- end }}

{{- define "aegis-sidecar.check-routes" -}}
{{- range $name, $value := .backend }}
{{- if $value }}
{{- fail (printf "aegis-sidecar: routes and backend.%s are set: give each route its backend" $name) }}
{{- end }}
{{- end }}
{{- if .socket.file }}
{{- fail "aegis-sidecar: routes and socket.file are set: give each route its socket.file" }}
{{- end }}
{{- $names := list }}
{{- $ports := list (int .adminPort) }}
{{- $files := list }}
{{- range $route := .routes }}
{{- if has $route.name $names }}
{{- fail (printf "aegis-sidecar: two routes are called %s: change one of them" $route.name) }}
{{- end }}
{{- $names = append $names $route.name }}
{{- if has (int $route.listenPort) $ports }}
{{- fail (printf "aegis-sidecar: the listenPort of route %s is %v, which is another one's or adminPort: change one of them" $route.name $route.listenPort) }}
{{- end }}
{{- $ports = append $ports (int $route.listenPort) }}
{{- $file := include "aegis-sidecar.socket-file" $route }}
{{- if has $file $files }}
{{- fail (printf "aegis-sidecar: the socket.file of route %s is %s, which is another one's: change one of them" $route.name $file) }}
{{- end }}
{{- $files = append $files $file }}
{{- $values := include "aegis-sidecar.of-route" (list $ $route) | fromYaml }}
{{- include "aegis-sidecar.check-route" (set (deepCopy $values) "listeners" $.routes) }}
{{- include "aegis-sidecar.check-env-of-route" (list $values (include "aegis-sidecar.route-prefix" $route)) }}
{{- include "aegis-sidecar.check-sizes" (list $values (include "aegis-sidecar.route-prefix" $route)) }}
{{- end }}
{{- $most := include "aegis-sidecar.routes-max" (not .socket.folder | ternary 2 3) | int }}
{{- if gt (len .routes) $most }}
{{- fail (printf "aegis-sidecar: there are %d routes, and each listens by IPv4, by IPv6 and with socket.folder at a socket: keep %d at most, or empty socket.folder" (len .routes) $most) }}
{{- end }}
{{- end }}

{{- /* How many routes there may be, which have so many addresses each: the program listens at 32 together. */}}
{{- define "aegis-sidecar.routes-max" -}}
{{ div 32 . }}
{{- end }}

{{- /* What the program would refuse of the sizes: a route's values, and what its variables begin with. */}}
{{- define "aegis-sidecar.check-sizes" -}}
{{- if eq (include "aegis-sidecar.pool-mode" (index . 0)) "request" }}
{{- with include "aegis-sidecar.odd-sizes" . }}{{ fail (printf "aegis-sidecar: %s" .) }}{{ end }}
{{- end }}
{{- end }}

{{- /* The same with what to change, for a pool mode of request: other modes make no use of pool.size. */}}
{{- define "aegis-sidecar.odd-sizes" -}}
{{- $env := (index . 0).env }}
{{- $own := index . 1 }}
{{- $size := get $env (print $own "POOL_SIZE") | default (get $env "AEGIS_POOL_SIZE") | default (index . 0).pool.size | toString | trim | float64 | int64 }}
{{- range $name := list "POOL_MIN_IDLE" "ENDPOINT_MAX" }}
{{- $variable := hasKey $env (print $own $name) | ternary (print $own $name) (print "AEGIS_" $name) }}
{{- $value := get $env $variable | trim }}
{{- if regexMatch "^[0-9]{1,9}$" $value }}
{{- if and (eq $name "POOL_MIN_IDLE") (gt (float64 $value | int64) $size) }}
{{- printf "env.%s is %s and pool.size is %d: set pool.size to %s or more, or env.%s to %d or less" $variable $value $size $value $variable $size }}
{{- else if and (eq $name "ENDPOINT_MAX") (lt (float64 $value | int64) $size) }}
{{- printf "env.%s is %s and pool.size is %d: set pool.size to %s or less, or env.%s to %d or more" $variable $value $size $value $variable $size }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "aegis-sidecar.check-route" -}}
{{- $kinds := include "aegis-sidecar.backend-kinds" . }}
{{- if contains " and " $kinds }}
{{- fail (printf "aegis-sidecar: %s are set: keep one of them" $kinds) }}
{{- end }}
{{- range $name, $bounds := include "aegis-sidecar.durations" . | fromYaml }}
{{- $value := $ }}
{{- range splitList "." $name }}{{ $value = get ($value | default dict) . }}{{ end }}
{{- if and $value (ne $value "off") }}
{{- $ms := include "aegis-sidecar.milliseconds" $value | int64 }}
{{- if or (lt $ms (include "aegis-sidecar.milliseconds" $bounds.min | int64)) (gt $ms (include "aegis-sidecar.milliseconds" $bounds.max | int64)) }}
{{- fail (printf "aegis-sidecar: %s is %s: set it to %s" $name $value (include "aegis-sidecar.accepted" $bounds)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (regexMatch "^[0-9]+$" (toString .backend.port)) (or (hasPrefix "0" (toString .backend.port)) (gt (float64 .backend.port) 65535.0)) }}
{{- fail (printf "aegis-sidecar: backend.port is %v: set it to a port's name, or a number from 1 to 65535" .backend.port) }}
{{- end }}
{{- with .backend.selector }}
{{- if or (eq (trim .) "none") (not (regexMatch (include "aegis-sidecar.selector" .) (trim .))) }}
{{- fail (printf "aegis-sidecar: backend.selector is %q: set it to a label selector such as app=db,role=replica" .) }}
{{- end }}
{{- end }}
{{- include "aegis-sidecar.check-resources" . }}
{{- /* Where there are routes, these are looked at one by one, and what of this goes together is theirs. */}}
{{- if not .routes }}{{ include "aegis-sidecar.check-together" . }}{{ end }}
{{- /* A route's values are checked as those of a sidecar with that route alone. */}}
{{- range include "aegis-sidecar.env" (set (deepCopy .) "env" dict) | fromYamlArray }}
{{- if hasKey $.env .name }}
{{- fail (printf "aegis-sidecar: env.%s: another value of the chart sets this variable: use that one" .name) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What of a route's values has to go together. */}}
{{- define "aegis-sidecar.check-together" -}}
{{- if eq (int .listenPort) (int .adminPort) }}
{{- fail (printf "aegis-sidecar: listenPort and adminPort are both %v: change one of them" .adminPort) }}
{{- end }}
{{- $mode := include "aegis-sidecar.pool-mode" . }}
{{- if and (eq .protocol "tcp") (ne $mode "preconnect") }}
{{- fail (printf "aegis-sidecar: protocol is tcp and pool.mode is %s: nobody can tell when an answer of unknown bytes is over, so no used connection may serve another client: empty pool.mode, or set protocol to chronos or http1" $mode) }}
{{- end }}
{{- if and (eq .balance "key_hash") (ne .protocol "chronos") }}
{{- fail (printf "aegis-sidecar: balance is key_hash and protocol is %s: only the requests of chronos have keys: set balance to least_conn, or protocol to chronos" .protocol) }}
{{- end }}
{{- if and (eq .balance "key_hash") (ne $mode "request") }}
{{- fail (printf "aegis-sidecar: balance is key_hash and pool.mode is %s: keys of one client may belong to several endpoints: set balance to least_conn, or pool.mode to request" $mode) }}
{{- end }}
{{- include "aegis-sidecar.check-addresses" . }}
{{- include "aegis-sidecar.check-backups" . }}
{{- end }}

{{- /* By what some endpoints stand in for others, if they do. */}}
{{- define "aegis-sidecar.tiers" -}}
{{- if .backend.addresses -}}
{{- if .backend.backups }}backend.backups is set{{ end }}
{{- else if eq .locality "failover" -}}
locality is failover
{{- end }}
{{- end }}

{{- /* Which of the three ways to name a backend are used. */}}
{{- define "aegis-sidecar.backend-kinds" -}}
{{- $kinds := list }}
{{- range list "service" "selector" "addresses" }}
{{- if get $.backend . }}{{ $kinds = append $kinds (printf "backend.%s" .) }}{{ end }}
{{- end }}
{{- join " and " $kinds }}
{{- end }}

{{- define "aegis-sidecar.check-resources" -}}
{{- $requests := .resources.requests | default dict }}
{{- $limits := .resources.limits | default dict }}
{{- if not (or .workers (hasKey $requests "cpu") (hasKey $limits "cpu")) }}
{{- fail "aegis-sidecar: resources.requests.cpu is not set, and there are as many workers as it has cores: set it, or workers" }}
{{- end }}
{{- range $kind, $amounts := dict "requests" $requests "limits" $limits }}
{{- range $name, $amount := $amounts }}
{{- $number := include "aegis-sidecar.number" $amount | float64 }}
{{- if le $number 0.0 }}
{{- fail (printf "aegis-sidecar: resources.%s.%s is %v: set it to more than 0" $kind $name $amount) }}
{{- end }}
{{- if and (eq $name "cpu") (gt $number 256.0) }}
{{- fail (printf "aegis-sidecar: resources.%s.cpu is %v: set it to 256 at most" $kind $amount) }}
{{- end }}
{{- $least := eq $kind "limits" | ternary "8Mi" "1Mi" }}
{{- if and (eq $name "memory") (lt $number (include "aegis-sidecar.number" $least | float64)) }}
{{- fail (printf "aegis-sidecar: resources.%s.memory is %v: set it to %s at least" $kind $amount $least) }}
{{- end }}
{{- if and (eq $kind "limits") (hasKey $requests $name) (lt $number (include "aegis-sidecar.number" (get $requests $name) | float64)) }}
{{- fail (printf "aegis-sidecar: resources.limits.%s is %v and resources.requests.%s is %v: set the limit to at least the request" $name $amount $name (get $requests $name)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The program's bounds of durations, by the values that set them. */}}
{{- define "aegis-sidecar.durations" -}}
queue.timeout: {variable: AEGIS_QUEUE_TIMEOUT, min: 10ms, max: 1h}
requestTimeout: {variable: AEGIS_REQUEST_TIMEOUT, min: 10ms, max: 1d, orOff: true}
connectTimeout: {variable: AEGIS_CONNECT_TIMEOUT, min: 1ms, max: 5m}
tcpUserTimeout: {variable: AEGIS_TCP_USER_TIMEOUT, min: 1s, max: 1d, orOff: true}
backendDrain: {variable: AEGIS_BACKEND_DRAIN, min: 0s, max: 1d, orOff: true}
failbackTime: {variable: AEGIS_FAILBACK_TIME, min: 0s, max: 1h}
check.interval: {variable: AEGIS_CHECK_INTERVAL, min: 100ms, max: 1h, orOff: true}
startTimeout: {variable: AEGIS_START_TIMEOUT, min: 0s, max: 5m}
drain.delay: {variable: AEGIS_DRAIN_DELAY, min: 0s, max: 5m}
drain.timeout: {variable: AEGIS_DRAIN_TIMEOUT, min: 0s, max: 1h}
{{- end }}

{{- define "aegis-sidecar.accepted" -}}
{{ if .orOff }}off, or {{ end }}a duration from {{ .min }} to {{ .max }}
{{- end }}

{{- define "aegis-sidecar.milliseconds" -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 "d" 86400000 -}}
{{ mul (regexFind "^[0-9]+" . | float64 | int64) (get $units (regexFind "[a-z]+$" .)) }}
{{- end }}

{{- /* A quantity of Kubernetes as a number. */}}
{{- define "aegis-sidecar.number" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $text := kindIs "string" . | ternary . (printf "%v" (. | float64)) -}}
{{ if regexMatch "[eE]" $text }}{{ float64 $text }}{{ else }}{{ mulf (regexFind "^[0-9.]+" $text | float64) (get $units (regexFind "[A-Za-z]*$" $text)) }}{{ end }}
{{- end }}
