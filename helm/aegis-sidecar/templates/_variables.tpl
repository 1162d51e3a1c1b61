{{- /* Made from the table in src/config/variables.rs by a test, which also says how to refresh it. */}}
{{- define "aegis-sidecar.variables" -}}
AEGIS_ROUTES: {"accepts":"1 to 16 of names, comma-separated; each up to 24 of a-z, 0-9 and single dashes","items":16}
AEGIS_LISTEN: {"accepts":"1 to 32 of IP:PORT or unix:/PATH, comma-separated; port 0 picks a free one","items":32,"ofRoutes":true}
AEGIS_SOCKET_MODE: {"accepts":"an octal number up to 0777","ofRoutes":true}
AEGIS_SOCKET_OWNER: {"accepts":"none, UID, UID:GID or :GID in numbers","ofRoutes":true,"words":["none"]}
AEGIS_BACKENDS: {"accepts":"1 to 1024 of HOST:PORT or unix:/PATH, comma-separated; IPv6 addresses in brackets","items":1024,"ofRoutes":true}
AEGIS_BACKUPS: {"accepts":"none, 1 to 1024 of HOST:PORT or unix:/PATH, comma-separated; none of AEGIS_BACKENDS","items":1024,"ofRoutes":true,"words":["none"]}
AEGIS_DNS_REFRESH: {"accepts":"a duration from 100ms to 1h","durations":[100,3600000],"ofRoutes":true}
AEGIS_DISCOVERY: {"accepts":"auto, static, dns or kubernetes","ofRoutes":true,"words":["auto","static","dns","kubernetes"]}
AEGIS_KUBE_SERVICE: {"accepts":"none, NAME or NAME.NAMESPACE","ofRoutes":true,"words":["none"]}
AEGIS_KUBE_SELECTOR: {"accepts":"none, or a label selector such as app=chronos","ofRoutes":true,"words":["none"]}
AEGIS_KUBE_NAMESPACE: {"accepts":"auto, or a namespace","ofRoutes":true,"words":["auto"]}
AEGIS_KUBE_PORT: {"accepts":"auto, a port's name, or a number from 1 to 65535","ofRoutes":true,"words":["auto"]}
AEGIS_KUBE_STORES: {"accepts":"auto, or a number from 1 to 1024","numbers":[1,1024],"ofRoutes":true,"words":["auto"]}
AEGIS_KUBE_WATCH_TIMEOUT: {"accepts":"a duration of whole seconds from 1s to 5m","durations":[1000,300000],"ofRoutes":true,"wholeSeconds":true}
AEGIS_KUBE_SNAPSHOT: {"accepts":"none, or an absolute path","ofRoutes":true,"words":["none"]}
AEGIS_KUBE_SNAPSHOT_MAX_AGE: {"accepts":"a duration from 1s to 30d","durations":[1000,2592000000],"ofRoutes":true}
AEGIS_LOCALITY: {"accepts":"off, zone, node or failover","ofRoutes":true,"words":["off","zone","node","failover"]}
AEGIS_FAILBACK_TIME: {"accepts":"a duration from 0s to 1h","durations":[0,3600000],"ofRoutes":true}
AEGIS_BACKEND_DRAIN: {"accepts":"off, or a duration from 0s to 1d","durations":[0,86400000],"ofRoutes":true,"words":["off"]}
AEGIS_SLOW_START: {"accepts":"off, or a duration from 100ms to 10m","durations":[100,600000],"ofRoutes":true,"words":["off"]}
AEGIS_ENDPOINT_WAIT: {"accepts":"a duration from 0s to 5m","durations":[0,300000],"ofRoutes":true}
AEGIS_BALANCE: {"accepts":"least_conn, round_robin, random_two, peak_ewma, source_hash or key_hash","ofRoutes":true,"words":["least_conn","round_robin","random_two","peak_ewma","source_hash","key_hash"]}
AEGIS_PROTOCOL: {"accepts":"tcp, chronos or http1","ofRoutes":true,"words":["tcp","chronos","http1"]}
AEGIS_PRESET: {"accepts":"none, postgres, mysql or redis","ofRoutes":true,"words":["none","postgres","mysql","redis"]}
AEGIS_POOL_MODE: {"accepts":"preconnect, session or request; tcp allows preconnect only","ofRoutes":true,"words":["preconnect","session","request"]}
AEGIS_POOL_SIZE: {"accepts":"a number from 1 to 4096","numbers":[1,4096],"ofRoutes":true}
AEGIS_POOL_MIN_IDLE: {"accepts":"a number from 0 to 4096, not above AEGIS_POOL_MAX_IDLE; of requests, AEGIS_POOL_SIZE","numbers":[0,4096],"ofRoutes":true}
AEGIS_POOL_MAX_IDLE: {"accepts":"a number from 0 to 4096","numbers":[0,4096],"ofRoutes":true}
AEGIS_ENDPOINT_MAX: {"accepts":"off, or a number from 1 to 1000000, not below AEGIS_POOL_MIN_IDLE and AEGIS_POOL_SIZE","numbers":[1,1000000],"ofRoutes":true,"words":["off"]}
AEGIS_POOL_IDLE_TIMEOUT: {"accepts":"off, or a duration from 10ms to 30d","durations":[10,2592000000],"ofRoutes":true,"words":["off"]}
AEGIS_POOL_MAX_LIFETIME: {"accepts":"off, or a duration from 10ms to 30d","durations":[10,2592000000],"ofRoutes":true,"words":["off"]}
AEGIS_QUEUE_MAX: {"accepts":"a number from 0 to 1000000","numbers":[0,1000000],"ofRoutes":true}
AEGIS_QUEUE_TIMEOUT: {"accepts":"a duration from 10ms to 1h","durations":[10,3600000],"ofRoutes":true}
AEGIS_REQUEST_TIMEOUT: {"accepts":"off, or a duration from 10ms to 1d","durations":[10,86400000],"ofRoutes":true,"words":["off"]}
AEGIS_LINE_MAX: {"accepts":"a number of bytes from 16 to 16384","numbers":[16,16384],"ofRoutes":true}
AEGIS_REPEAT_WRITES: {"accepts":"on or off","ofRoutes":true,"words":["on","off"]}
AEGIS_CONNECT_TIMEOUT: {"accepts":"a duration from 1ms to 5m","durations":[1,300000],"ofRoutes":true}
AEGIS_CONNECT_ATTEMPTS: {"accepts":"a number from 1 to 8","numbers":[1,8],"ofRoutes":true}
AEGIS_RETRY_BUDGET: {"accepts":"off, or a number of percent from 0 to 1000","numbers":[0,1000],"ofRoutes":true,"words":["off"]}
AEGIS_IDLE_TIMEOUT: {"accepts":"off, or a duration from 10ms to 30d","durations":[10,2592000000],"ofRoutes":true,"words":["off"]}
AEGIS_HALF_CLOSE_TIMEOUT: {"accepts":"off, or a duration from 10ms to 30d","durations":[10,2592000000],"ofRoutes":true,"words":["off"]}
AEGIS_TCP_USER_TIMEOUT: {"accepts":"off, or a duration from 1s to 1d","durations":[1000,86400000],"ofRoutes":true,"words":["off"]}
AEGIS_KEEPALIVE: {"accepts":"off, or a duration from 1s to 9h","durations":[1000,32400000],"ofRoutes":true,"words":["off"]}
AEGIS_PROXY_PROTOCOL: {"accepts":"off, v1 or v2","ofRoutes":true,"words":["off","v1","v2"]}
AEGIS_LOG_ENDS: {"accepts":"off, abnormal, sampled or all","ofRoutes":true,"words":["off","abnormal","sampled","all"]}
AEGIS_EJECT_FAILURES: {"accepts":"a number from 1 to 1000","numbers":[1,1000],"ofRoutes":true}
AEGIS_EJECT_TIME: {"accepts":"a duration from 10ms to 1h","durations":[10,3600000],"ofRoutes":true}
AEGIS_CHECK_INTERVAL: {"accepts":"off, or a duration from 100ms to 1h","durations":[100,3600000],"ofRoutes":true,"words":["off"]}
AEGIS_CHECK: {"accepts":"connect or request","ofRoutes":true,"words":["connect","request"]}
AEGIS_CHECK_PATH: {"accepts":"a path such as /healthz","ofRoutes":true}
AEGIS_CHECK_FALL: {"accepts":"a number from 1 to 1000","numbers":[1,1000],"ofRoutes":true}
AEGIS_CHECK_RISE: {"accepts":"a number from 1 to 1000","numbers":[1,1000],"ofRoutes":true}
AEGIS_SLOW_FIRST_BYTE: {"accepts":"off, or a duration from 1ms to 1h","durations":[1,3600000],"ofRoutes":true,"words":["off"]}
AEGIS_WORKERS: {"accepts":"auto (or 0), or a number from 1 to 256","numbers":[1,256],"words":["auto","0"]}
AEGIS_PIN: {"accepts":"auto, on or off","words":["auto","on","off"]}
AEGIS_CPU_REQUEST: {"accepts":"none (or 0), or a number of thousandths of a CPU","numbers":[1,18446744073709551615],"words":["none","0"]}
AEGIS_CPU_LIMIT: {"accepts":"none (or 0), or a number of thousandths of a CPU","numbers":[1,18446744073709551615],"words":["none","0"]}
AEGIS_MEMORY_REQUEST: {"accepts":"none (or 0), or a number of bytes","numbers":[1,18446744073709551615],"words":["none","0"]}
AEGIS_MEMORY_LIMIT: {"accepts":"none (or 0), or a number of bytes","numbers":[1,18446744073709551615],"words":["none","0"]}
AEGIS_IO: {"accepts":"auto, uring or epoll","words":["auto","uring","epoll"]}
AEGIS_MAX_SESSIONS: {"accepts":"auto, or a number from 1 to 1000000","numbers":[1,1000000],"words":["auto"]}
AEGIS_NODE_NAME: {"accepts":"none, or a node's name"}
AEGIS_ZONE: {"accepts":"none, or a zone's name"}
AEGIS_REGION: {"accepts":"none, or a region's name"}
AEGIS_START_TIMEOUT: {"accepts":"a duration from 0s to 5m","durations":[0,300000]}
AEGIS_DRAIN_DELAY: {"accepts":"a duration from 0s to 5m","durations":[0,300000]}
AEGIS_DRAIN_TIMEOUT: {"accepts":"a duration from 0s to 1h","durations":[0,3600000]}
AEGIS_ADMIN: {"accepts":"IP:PORT; port 0 picks a free one"}
AEGIS_CONTROL: {"accepts":"off, or unix:/PATH","words":["off"]}
AEGIS_LOG: {"accepts":"off, error, warn, info, debug, trace, or directives such as info,aegis::io=debug"}
AEGIS_LOG_FORMAT: {"accepts":"text or json","words":["text","json"]}
{{- end }}

{{- /* What directives of the log may name of the program. */}}
{{- define "aegis-sidecar.modules" -}}
["capture","cli","config","control","fifo","io","limits","listening","metrics","protocol","proxy","slab","startup","worker"]
{{- end }}
