"""A real Kubernetes API server with its etcd, from KUBEBUILDER_ASSETS. No node: no pod runs."""

import contextlib
import json
import pathlib
import subprocess

import yaml

from containers import eventually, free_port
from tools import WORK, run


class ApiServer:
    def __init__(self, kubeconfig):
        self.kubeconfig = kubeconfig
        # Known once the server answers: see `describes_itself`.
        self.complete = True

    def describes_itself(self):
        """Whether it says in OpenAPI what it accepts. One that was built without its generated
        descriptions can neither let clients check what they send nor apply by itself."""
        described = json.loads(self.kubectl("get", "--raw", "/openapi/v3/api/v1").stdout)
        return "parameters" in described["paths"]["/api/v1/namespaces/{namespace}/pods"]["post"]

    def kubectl(self, *arguments, **options):
        return run(WORK / "kubectl", "--kubeconfig", self.kubeconfig, *arguments, **options)

    def helm(self, verb, *arguments, **options):
        relaxed = []
        if not self.complete and verb in ["install", "upgrade"]:
            relaxed = ["--disable-openapi-validation", "--server-side=false"]
        return run(WORK / "helm", "--kubeconfig", self.kubeconfig, verb, *relaxed, *arguments, **options)

    def apply(self, *arguments):
        how = ["--server-side"] if self.complete else ["--validate=false"]
        return self.kubectl("apply", *how, *arguments)

    def create(self, item, *arguments, check=True):
        """What the server makes of an object, or the failed command."""
        relaxed = [] if self.complete else ["--validate=false"]
        result = self.kubectl("create", "-o", "json", "-f", "-", *relaxed, *arguments, check=check, input=json.dumps(item))
        return json.loads(result.stdout) if result.returncode == 0 else result

    def get(self, *arguments):
        return json.loads(self.kubectl("get", "-o", "json", *arguments).stdout)

    def may(self, account, verb, resource, namespace):
        result = self.kubectl("auth", "can-i", verb, resource, "--namespace", namespace, "--as", account, check=False)
        return result.stdout.strip().endswith("yes")


@contextlib.contextmanager
def api_server(assets, folder):
    assets = pathlib.Path(assets)
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    run("openssl", "genrsa", "-out", folder / "key", "2048")
    run("openssl", "rsa", "-in", folder / "key", "-pubout", "-out", folder / "key.pub")
    (folder / "tokens.csv").write_text("tests,admin,admin,system:masters\n")
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}],
        "users": [{"name": "tests", "user": {"token": "tests"}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}]}))
    commands = [
        [assets / "etcd", "--data-dir", folder / "etcd", "--unsafe-no-fsync",
         f"--listen-client-urls=http://127.0.0.1:{etcd_port}", f"--advertise-client-urls=http://127.0.0.1:{etcd_port}",
         f"--listen-peer-urls=http://127.0.0.1:{peer_port}"],
        [assets / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd_port}", f"--secure-port={port}",
         "--bind-address=127.0.0.1", "--cert-dir", folder / "certificates", "--authorization-mode=RBAC",
         "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file", folder / "key.pub",
         "--service-account-signing-key-file", folder / "key", "--token-auth-file", folder / "tokens.csv",
         "--service-cluster-ip-range=10.0.0.0/24"],
    ]
    server = ApiServer(kubeconfig)
    with contextlib.ExitStack() as stack:
        for command in commands:
            log = stack.enter_context((folder / f"{command[0].name}.log").open("w"))
            process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        eventually(lambda: server.kubectl("get", "--raw", "/readyz", check=False).stdout == "ok",
                   lambda: (folder / "kube-apiserver.log").read_text()[-3000:], seconds=90)
        server.complete = server.describes_itself()
        yield server
