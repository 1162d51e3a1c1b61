{{- /* What the program would refuse of the addresses of backends. */}}
{{- define "aegis-sidecar.check-addresses" -}}
{{- $values := . }}
{{- $most := (get (include "aegis-sidecar.variables" . | fromYaml) "AEGIS_BACKENDS").items | int }}
{{- $count := 0 }}
{{- range $name := list "addresses" "backups" }}
{{- $seen := list }}
{{- range get $values.backend $name | default "" | replace " " "" | splitList "," | compact }}
{{- $port := regexFind "[0-9]+$" . }}
{{- if or (hasPrefix "0" $port) (gt (int64 $port) 65535) }}
{{- fail (printf "aegis-sidecar: backend.%s has %s: set its port to one from 1 to 65535, without zeros in front" $name .) }}
{{- end }}
{{- $address := include "aegis-sidecar.address" . }}
{{- if not $address }}
{{- fail (printf "aegis-sidecar: backend.%s has %s: write HOST:PORT, and IPv6 addresses in brackets" $name .) }}
{{- end }}
{{- if has $address $seen }}
{{- fail (printf "aegis-sidecar: backend.%s has %s twice: remove one of them" $name .) }}
{{- end }}
{{- /* To connect to no address in particular is to connect to loopback. */}}
{{- $reached := $address | replace "0.0.0.0:" "127.0.0.1:" | replace "[0:0:0:0:0:0:0:0]:" "[0:0:0:0:0:0:0:1]:" }}
{{- $item := . }}
{{- range $other := $values.listeners | default (list (dict "listenPort" $values.listenPort)) }}
{{- if has $reached (list (printf "127.0.0.1:%d" (int $other.listenPort)) (printf "[0:0:0:0:0:0:0:1]:%d" (int $other.listenPort))) }}
{{- $whose := eq (int $other.listenPort) (int $values.listenPort) | ternary "" (printf " for its route %s" $other.name) }}
{{- fail (printf "aegis-sidecar: backend.%s has %s, where the sidecar itself listens%s: change it, or listenPort" $name $item $whose) }}
{{- end }}
{{- end }}
{{- $seen = append $seen $address }}
{{- end }}
{{- $count = add $count (len $seen) }}
{{- end }}
{{- if gt (int $count) $most }}
{{- fail (printf "aegis-sidecar: backend.addresses and backend.backups have %d items: keep %d at most" (int $count) $most) }}
{{- end }}
{{- end }}

{{- /* What stands in for others is something else than these, and what has its own keys cannot. */}}
{{- define "aegis-sidecar.check-backups" -}}
{{- $backups := .backend.backups | default "" }}
{{- if and $backups (not .backend.addresses) }}
{{- fail "aegis-sidecar: backend.backups is set and backend.addresses is not: only what is listed has others to stand in for it: empty backend.backups, or set locality to failover" }}
{{- end }}
{{- $backends := list }}
{{- range .backend.addresses | default "" | replace " " "" | splitList "," | compact }}
{{- $backends = append $backends (include "aegis-sidecar.address" .) }}
{{- end }}
{{- range $backups | replace " " "" | splitList "," | compact }}
{{- if has (include "aegis-sidecar.address" .) $backends }}
{{- fail (printf "aegis-sidecar: %s is in backend.addresses and in backend.backups: nothing stands in for itself: remove it from one of them" .) }}
{{- end }}
{{- end }}
{{- with and (eq .balance "key_hash") (include "aegis-sidecar.tiers" .) }}
{{- fail (printf "aegis-sidecar: balance is key_hash and %s: no store has the keys of another one: set balance to least_conn, or %s" . (contains "locality" . | ternary "locality to off" "empty backend.backups")) }}
{{- end }}
{{- end }}

{{- /* HOST:PORT in the one spelling by which addresses are compared, or nothing where it is none. */}}
{{- define "aegis-sidecar.address" -}}
{{- $port := regexFind ":[1-9][0-9]{0,4}$" . -}}
{{- $host := trimSuffix $port . | lower -}}
{{- if or (not $port) (gt (trimPrefix ":" $port | int) 65535) (hasPrefix "unix:" .) }}{{ $host = "" }}{{ end -}}
{{- $label := "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?" -}}
{{- if and (hasPrefix "[" $host) (hasSuffix "]" $host) -}}
{{- with include "aegis-sidecar.ipv6" (substr 1 (sub (len $host) 1 | int) $host) -}}{{ . }}{{ $port }}{{- end -}}
{{- else if regexMatch "(^|[.])[0-9]+[.]?$" $host -}}
{{- /* A name that ends in a number is an address of IPv4. */ -}}
{{- if regexMatch (printf "^%s$" (include "aegis-sidecar.ipv4" .)) $host -}}{{ $host }}{{ $port }}{{- end -}}
{{- else if and (le (len (trimSuffix "." $host)) 253) (regexMatch (printf "^%s([.]%s)*[.]?$" $label $label) $host) -}}
{{ $host }}{{ $port }}
{{- end -}}
{{- end }}

{{- /* The pattern of an address of IPv4. */}}
{{- define "aegis-sidecar.ipv4" -}}
{{- $byte := "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])" -}}
{{ $byte }}([.]{{ $byte }}){3}
{{- end }}

{{- /* An address of IPv6 with all of its groups, in brackets; one of IPv4 where it stands for that. */}}
{{- define "aegis-sidecar.ipv6" -}}
{{- $text := . -}}
{{- /* Its end may be written as one of IPv4 is. */ -}}
{{- $end := regexFind (printf ":%s$" (include "aegis-sidecar.ipv4" .)) $text | trimPrefix ":" -}}
{{- if $end -}}
{{- $bytes := splitList "." $end -}}
{{- $groups := printf "%02x%02x:%02x%02x" (index $bytes 0 | atoi) (index $bytes 1 | atoi) (index $bytes 2 | atoi) (index $bytes 3 | atoi) -}}
{{- $text = print (trimSuffix $end $text) $groups -}}
{{- end -}}
{{- $halves := splitList "::" $text -}}
{{- $groups := list -}}
{{- $right := list -}}
{{- with first $halves }}{{ $groups = splitList ":" . }}{{ end -}}
{{- if eq (len $halves) 2 }}{{ with last $halves }}{{ $right = splitList ":" . }}{{ end }}{{ end -}}
{{- $missing := sub 8 (add (len $groups) (len $right)) | int -}}
{{- $fits := or (and (eq (len $halves) 1) (eq $missing 0)) (and (eq (len $halves) 2) (ge $missing 1)) -}}
{{- if $fits }}{{ range until $missing }}{{ $groups = append $groups "0" }}{{ end }}{{ end -}}
{{- $short := list -}}
{{- range concat $groups $right -}}
{{- if not (regexMatch "^[0-9a-f]{1,4}$" .) }}{{ $fits = false }}{{ end -}}
{{- $short = append $short (regexReplaceAll "^0+([0-9a-f])" . "${1}") -}}
{{- end -}}
{{- if and $fits (hasPrefix "0:0:0:0:0:ffff:" (join ":" $short)) -}}
{{- $bytes := list -}}
{{- range slice $short 6 -}}
{{- $group := printf "0x%s" . | int64 -}}
{{- $bytes = concat $bytes (list (div $group 256 | toString) (mod $group 256 | toString)) -}}
{{- end -}}
{{ join "." $bytes }}
{{- else if $fits -}}
[{{ join ":" $short }}]
{{- end -}}
{{- end }}
