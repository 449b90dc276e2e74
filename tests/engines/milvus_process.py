"""Runs a real Milvus: `python milvus_process.py FOLDER PORT [setting=value...]`. Says "up", and ends with its input."""

import signal
import sys

from milvus import MilvusServer, MilvusServerConfig

if __name__ == "__main__":
    folder, port, *settings = sys.argv[1:]
    config = MilvusServerConfig(data_dir=folder)
    for setting in settings:
        config.set(*setting.split("=", 1))
    server = MilvusServer(config, proxy_port=int(port))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        server.start()
        sys.stdout.write("up\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        server.stop()
