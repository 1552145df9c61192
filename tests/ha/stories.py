"""The stories of tests/story on a Redis Cluster: whatever needs two slots in one command fails there (CROSSSLOT).

python -m tests.ha.stories [arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ha.redis_cluster import RedisCluster

# They look into the one server or restart it: not stories of the path.
NOT_HERE = ("test_readme", "sealed")


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="fairdrop-stories-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        with RedisCluster(home / "redis") as cluster:
            chosen = " and ".join(f"not {one}" for one in NOT_HERE)
            command = [sys.executable, "-m", "pytest", "-q", "tests/story", "-k", chosen]
            environment = os.environ | {"FAIRDROP_TEST_REDIS_URL": cluster.url}
            return subprocess.run([*command, *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
