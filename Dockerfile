# One static binary on an empty image. Each platform builds itself: `docker buildx build
# --platform linux/amd64,linux/arm64`. Targets: proxy (the default, last) and store (the demo's).

ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG RUNTIME_IMAGE=scratch

FROM ${RUST_IMAGE} AS dependencies
WORKDIR /build
# The C library is linked in, so the image needs none. `--target` keeps that from build scripts
# and macros, which have to be loaded. What tells how to unwind is of no use without symbols.
ENV RUSTFLAGS="-C target-feature=+crt-static -C force-unwind-tables=no" CARGO_PROFILE_RELEASE_STRIP=symbols
# Empty sources in the places that the manifest names: this layer changes with the lock file only.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src examples/demo benches/compare tests/e2e \
 && touch src/lib.rs tests/e2e/main.rs \
 && for main in src/main.rs examples/demo/main.rs benches/micro.rs benches/compare/main.rs; do echo 'fn main() {}' > "$main"; done \
 && cargo build --locked --release --target "$(rustc --print host-tuple)" --bin aegis-proxy

FROM dependencies AS build
COPY src src
# Newer than what the empty sources were built to, whatever the copies' dates are.
RUN find src -name '*.rs' -exec touch {} + \
 && cargo build --locked --release --target "$(rustc --print host-tuple)" --bin aegis-proxy \
 && mkdir -p /image/usr/local/bin \
 && cp target/*/release/aegis-proxy /image/usr/local/bin/

FROM build AS build-store
COPY examples examples
RUN find examples -name '*.rs' -exec touch {} + \
 && cargo build --locked --release --target "$(rustc --print host-tuple)" --example demo \
 && mkdir -p /store/usr/local/bin /store/data \
 && cp target/*/release/examples/demo /store/usr/local/bin/

FROM ${RUNTIME_IMAGE} AS store
LABEL org.opencontainers.image.title="aegis-demo-store" \
      org.opencontainers.image.description="A small key-value store to try Aegis with" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build-store --chown=65532:65532 /store/ /
ENV DEMO_DATA=/data
USER 65532:65532
VOLUME /data
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/demo"]
CMD ["store", "0.0.0.0:8080"]

FROM ${RUNTIME_IMAGE} AS proxy
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="aegis-proxy" \
      org.opencontainers.image.description="A Layer 4 TCP proxy and connection pooler for the sidecar of a database's clients" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /image/ /
USER 65532:65532
# 8081 takes clients and 8082 tells about the proxy.
EXPOSE 8081 8082
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/aegis-proxy"]
