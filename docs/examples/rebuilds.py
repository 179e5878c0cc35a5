#!/usr/bin/python3
"""Watches the rebuilds of a Gabion cluster: one line for each message, until nothing is left to rebuild.

    rebuilds.py CLIENT_TOML [PROTO_DIR]

CLIENT_TOML names the monitors and, with TLS, a certificate (role viewer is enough). PROTO_DIR holds
gabion/v1/*.proto (default: proto/proto of this checkout). Needs Python 3.11 and, on Debian, python3-grpcio and
python3-grpc-tools; elsewhere grpcio and grpcio-tools.

What a client in any language has to do:
  - Ask the leader. Another monitor answers UNAVAILABLE and names it in the metadata gabion-leader; without that, try
    the next one. The stream ends the same way when the leader changes.
  - With TLS, check that the certificate of the other side is for monitor.gabion, and show one's own.
"""

import os
import sys
import tempfile
import time
import tomllib

import grpc
from grpc_tools import protoc

TRY_FOR_S = 60


def generated(proto_dir):
    """The classes of the API, made from the .proto files."""
    files = [os.path.join(proto_dir, "gabion/v1", name) for name in ("cluster.proto", "status.proto")]
    with tempfile.TemporaryDirectory(prefix="gabion-api-") as out:
        if protoc.main(["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}", *files]) != 0:
            sys.exit(f"cannot make Python of the files in {proto_dir}")
        sys.path.insert(0, out)
        from gabion.v1 import status_pb2, status_pb2_grpc

    return status_pb2, status_pb2_grpc


def connector(config, directory):
    """A function that makes a channel to an address."""
    tls = config.get("tls")
    if not tls:
        return grpc.insecure_channel

    def content(name):
        with open(os.path.join(directory, tls[name]), "rb") as file:
            return file.read()

    credentials = grpc.ssl_channel_credentials(content("ca"), content("key"), content("cert"))
    options = [("grpc.ssl_target_name_override", "monitor.gabion")]
    return lambda address: grpc.secure_channel(address, credentials, options)


def watch(channel, api, stubs):
    """Prints until the stream ends. Raises grpc.RpcError when this is not the leader, or no longer."""
    for status in stubs.StatusServiceStub(channel).WatchRebuilds(api.WatchRebuildsRequest(until_clean=True)):
        print(
            f"pgs_not_clean={status.pgs_not_clean} degraded_objects={status.degraded_objects}"
            f" recovered_objects={status.recovered_objects} rate_bytes_per_s={status.rate_bytes_per_s:.0f}"
            f" eta_s={status.eta_s}",
            flush=True,
        )


def main(client_toml, proto_dir):
    api, stubs = generated(proto_dir)
    with open(client_toml, "rb") as file:
        config = tomllib.load(file)
    connect = connector(config, os.path.dirname(os.path.abspath(client_toml)))
    monitors = config["monitors"]
    address = monitors[0]
    give_up = time.monotonic() + TRY_FOR_S
    while True:
        try:
            with connect(address) as channel:
                return watch(channel, api, stubs)
        except grpc.RpcError as error:
            metadata = dict(error.trailing_metadata() or ())
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > give_up:
                sys.exit(f"{address}: {error.details()}")
            following = monitors[(monitors.index(address) + 1) % len(monitors)] if address in monitors else monitors[0]
            address = metadata.get("gabion-leader") or following
            time.sleep(0.2)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    here = os.path.dirname(os.path.abspath(__file__))
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else os.path.join(here, "../../proto/proto"))
