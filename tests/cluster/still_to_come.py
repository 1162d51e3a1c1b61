"""What the charts and the dashboard already name and the proxy does not have yet: to be empty."""

METRICS = {
    "aegis_queue_depth",
    "aegis_queue_wait_seconds",
    "aegis_request_duration_seconds",
    "aegis_requests_total",
    "aegis_retries_total",
}

VARIABLES = {
    "AEGIS_POOL_MODE",
    "AEGIS_PROTOCOL",
}
