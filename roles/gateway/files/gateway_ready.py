"""Whether the gateway shows a certificate for the public name; run by kit_services until it does.

usage: gateway_ready.py HTTP_PORT HTTPS_PORT NAME
"""

import http.client
import socket
import ssl
import sys


def main(port: str, tls_port: str, name: str) -> str:
    """'' when ready, else what is missing."""
    # Who signed the certificate is for browsers to judge; without one for this name there is no handshake.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", int(tls_port)), timeout=5) as plain:
            context.wrap_socket(plain, server_hostname=name).close()
    except ssl.SSLError as error:
        return (
            f"no certificate for {name} yet ({error.reason}). The certificate authority must reach this host at port "
            f"80 (passed on to {port}) or 443 (passed on to {tls_port}) of {name}; what it said is in the log."
        )
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
    return "" if status == 200 else f"the gateway answers {status}"


if __name__ == "__main__":
    try:
        problem = main(*sys.argv[1:])
    except OSError as error:
        problem = str(error)
    sys.exit(problem or None)
