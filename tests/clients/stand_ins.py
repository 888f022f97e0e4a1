"""What the clients look for around them and a test machine lacks, so that they run unchanged.

* A Docker daemon: firecracker-python asks for its version in its constructor, image or none. DOCKER_HOST names ours.
* A service that tells one's public address: firecracker-python's constructor asks https://ifconfig.me. /etc/hosts names
  ours, and REQUESTS_CA_BUNDLE its certificate. The mounts and the network have to be one's own (host.sh).
* A parent that reaps: a client waits for the process to vanish, which it does once its parent has asked how it ended.
"""

import datetime
import os
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer


def docker_daemon(folder):
    """Serves GET /version, all that is asked for."""

    class Daemon(ThreadingMixIn, UnixStreamServer):
        daemon_threads = True

    socket = Path(folder) / "docker.sock"
    _serve(Daemon(str(socket), _answering(b'{"ApiVersion": "1.44", "Version": "25.0"}')))
    os.environ["DOCKER_HOST"] = f"unix://{socket}"


def public_address(folder, address="198.51.100.2"):
    """Serves https://ifconfig.me."""
    name = "ifconfig.me"
    certificate, key = _certificate(Path(folder), name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 443), _answering(address.encode()))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    _serve(server)
    with open("/etc/hosts", "a") as hosts:
        hosts.write(f"127.0.0.1 {name}\n")
    os.environ["REQUESTS_CA_BUNDLE"] = str(certificate)


class Reaper:
    """Reaps the child `pid` when it ends."""

    def __init__(self, pid):
        self._status = None
        self._thread = threading.Thread(target=self._wait, args=(pid,), daemon=True)
        self._thread.start()

    def _wait(self, pid):
        self._status = os.waitpid(pid, 0)[1]

    def exit_status(self):
        """How it ended, as subprocess tells it: negative for a signal. Waits until it has."""
        self._thread.join()
        return os.waitstatus_to_exitcode(self._status)


def _answering(body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


def _serve(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _certificate(folder, name):
    """A certificate for `name` that is its own authority."""
    # A package that the one client that needs this brings along.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"], False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths
