"""What the charts and the dashboard already name and the proxy does not have yet: to be empty."""

METRICS = {
    "aegis_discovery_endpoints",
    "aegis_discovery_errors_total",
    "aegis_discovery_last_sync_timestamp_seconds",
    "aegis_queue_depth",
    "aegis_queue_wait_seconds",
    "aegis_request_duration_seconds",
    "aegis_requests_total",
    "aegis_retries_total",
}

VARIABLES = {
    "AEGIS_DISCOVERY",
    "AEGIS_KUBE_NAMESPACE",
    "AEGIS_KUBE_PORT",
    "AEGIS_KUBE_SELECTOR",
    "AEGIS_KUBE_SERVICE",
    "AEGIS_LOCALITY",
    "AEGIS_NODE_NAME",
    "AEGIS_POOL_MODE",
    "AEGIS_PROTOCOL",
    "AEGIS_ZONE",
}
