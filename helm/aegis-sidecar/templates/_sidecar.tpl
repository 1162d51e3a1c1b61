{{- /*
What a pod needs for Aegis, from the values of this chart: to include in your own pod's spec.

  initContainers:
    {{- include "aegis-sidecar.container" .Values.sidecar | nindent 8 }}
  volumes:
    {{- include "aegis-sidecar.volume" .Values.sidecar | nindent 8 }}

Each gives a list of one item. The sidecar comes first, so that it serves those that follow it.
*/}}
{{- define "aegis-sidecar.container" -}}
{{- include "aegis-sidecar.check" . -}}
{{- list (include "aegis-sidecar.container-spec" . | fromYaml) | toYaml }}
{{- end }}

{{- define "aegis-sidecar.volume" -}}
{{- list (include "aegis-sidecar.volume-spec" . | fromYaml) | toYaml }}
{{- end }}

{{- define "aegis-sidecar.container-spec" -}}
name: {{ .name }}
image: {{ printf "%s:%s" .image.repository .image.tag | toJson }}
imagePullPolicy: {{ .image.pullPolicy }}
restartPolicy: Always
env:
  {{- include "aegis-sidecar.env" . | nindent 2 }}
ports:
  - name: aegis-admin
    containerPort: {{ .adminPort }}
    protocol: TCP
startupProbe:
  {{- include "aegis-sidecar.probe" (list . "startupz" 1 60) | nindent 2 }}
livenessProbe:
  {{- include "aegis-sidecar.probe" (list . "livez" 10 3) | nindent 2 }}
{{- if .readiness }}
readinessProbe:
  {{- include "aegis-sidecar.probe" (list . "readyz" 5 2) | nindent 2 }}
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
  - name: {{ .name }}-token
    mountPath: /var/run/secrets/kubernetes.io/serviceaccount
    readOnly: true
{{- end }}

{{- define "aegis-sidecar.probe" -}}
{{- $values := index . 0 -}}
httpGet:
  path: /{{ index . 1 }}
  port: {{ $values.adminPort }}
periodSeconds: {{ index . 2 }}
failureThreshold: {{ index . 3 }}
timeoutSeconds: 2
{{- end }}

{{- /* The variables that the values stand for; `.env` adds others. */}}
{{- define "aegis-sidecar.env" -}}
{{- $port := .listenPort -}}
- {name: AEGIS_LISTEN, value: "127.0.0.1:{{ $port }},[::1]:{{ $port }}"}
- {name: AEGIS_ADMIN, value: "[::]:{{ .adminPort }}"}
{{- with .backend }}
{{- if .addresses }}
- {name: AEGIS_BACKENDS, value: {{ toJson .addresses }}}
{{- else }}
- {name: AEGIS_DISCOVERY, value: kubernetes}
{{- if .selector }}
- {name: AEGIS_KUBE_SELECTOR, value: {{ toJson .selector }}}
{{- else }}
- {name: AEGIS_KUBE_SERVICE, value: {{ toJson .service }}}
{{- end }}
{{- if .namespace }}
- {name: AEGIS_KUBE_NAMESPACE, value: {{ .namespace }}}
{{- else }}
- {name: AEGIS_KUBE_NAMESPACE, valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}}
{{- end }}
{{- if .port }}
- {name: AEGIS_KUBE_PORT, value: {{ toString .port | toJson }}}
{{- end }}
{{- end }}
{{- end }}
- {name: AEGIS_PROTOCOL, value: {{ toJson .protocol }}}
- {name: AEGIS_POOL_MODE, value: {{ include "aegis-sidecar.pool-mode" . | toJson }}}
- {name: AEGIS_POOL_SIZE, value: {{ int .pool.size | toString | toJson }}}
- {name: AEGIS_QUEUE_MAX, value: {{ int .queue.max | toString | toJson }}}
- {name: AEGIS_QUEUE_TIMEOUT, value: {{ .queue.timeout }}}
- {name: AEGIS_REQUEST_TIMEOUT, value: {{ toJson .requestTimeout }}}
- {name: AEGIS_ROUTE, value: {{ .route }}}
{{- if ne (toString .stores) "auto" }}
- {name: AEGIS_KUBE_STORES, value: {{ int .stores | toString | toJson }}}
{{- end }}
{{- if ne .locality "off" }}
- {name: AEGIS_LOCALITY, value: {{ .locality }}}
- {name: AEGIS_NODE_NAME, valueFrom: {fieldRef: {apiVersion: v1, fieldPath: spec.nodeName}}}
{{- if eq .locality "zone" }}
- name: AEGIS_ZONE
  valueFrom: {fieldRef: {apiVersion: v1, fieldPath: "metadata.labels['topology.kubernetes.io/zone']"}}
{{- end }}
{{- end }}
- {name: AEGIS_DRAIN_DELAY, value: {{ .drain.delay }}}
- {name: AEGIS_DRAIN_TIMEOUT, value: {{ .drain.timeout }}}
{{- range $name, $value := .env }}
- {name: {{ $name }}, value: {{ toJson $value }}}
{{- end }}
{{- end }}

{{- define "aegis-sidecar.pool-mode" -}}
{{ .pool.mode | default (eq .protocol "tcp" | ternary "preconnect" "request") }}
{{- end }}

{{- define "aegis-sidecar.volume-spec" -}}
name: {{ .name }}-token
projected:
  sources:
    - serviceAccountToken: {path: token, expirationSeconds: 3607}
    - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
    - downwardAPI: {items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]}
{{- end }}

{{- /* Refuses what no schema can refuse with a message that helps. */}}
{{- define "aegis-sidecar.check" -}}
{{- if not (include "aegis-sidecar.backend-kinds" .) }}
{{- fail "aegis-sidecar: no backend: set one of backend.service, backend.selector and backend.addresses" }}
{{- end }}
{{- include "aegis-sidecar.check-options" . }}
{{- end }}

{{- /* The same where the service may come later, by annotation. */}}
{{- define "aegis-sidecar.check-options" -}}
{{- $kinds := include "aegis-sidecar.backend-kinds" . }}
{{- if contains " and " $kinds }}
{{- fail (printf "aegis-sidecar: %s are set: keep one of them" $kinds) }}
{{- end }}
{{- if eq (int .listenPort) (int .adminPort) }}
{{- fail (printf "aegis-sidecar: listenPort and adminPort are both %v: change one of them" .adminPort) }}
{{- end }}
{{- $mode := include "aegis-sidecar.pool-mode" . }}
{{- if and (eq .protocol "tcp") (ne $mode "preconnect") }}
{{- fail (printf "aegis-sidecar: protocol is tcp and pool.mode is %s: nobody can tell when an answer of unknown bytes is over, so no used connection may be lent: empty pool.mode, or set protocol to chronos or http1" $mode) }}
{{- end }}
{{- if and (eq .route "key") (ne .protocol "chronos") }}
{{- fail (printf "aegis-sidecar: route is key and protocol is %s: only the requests of chronos have keys: set route to balance, or protocol to chronos" .protocol) }}
{{- end }}
{{- if and (eq .route "key") (ne $mode "request") }}
{{- fail (printf "aegis-sidecar: route is key and pool.mode is %s: keys of one client may belong to several endpoints: set route to balance, or pool.mode to request" $mode) }}
{{- end }}
{{- range include "aegis-sidecar.env" (set (deepCopy .) "env" dict) | fromYamlArray }}
{{- if hasKey $.env .name }}
{{- fail (printf "aegis-sidecar: env.%s: another value of the chart sets this variable: use that one" .name) }}
{{- end }}
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
