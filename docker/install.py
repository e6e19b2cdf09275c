"""``install.py ARGUMENTS`` installs what ``pip install ARGUMENTS`` would, with uv, which is several
times as fast; with pip where uv cannot be had or does not succeed.

uv comes from where pip's packages come from and is told of the same places: pip.conf's (a build's
secret is /etc/pip.conf) and those of PIP_*. It stays out of the image. What both download is kept
in the folder that CACHE names.
"""

import ast
import os
import subprocess
import sys
import tempfile

OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
"""pip's setting -> uv's option."""
PIP = [sys.executable, "-m", "pip"]
CACHE = os.environ.get("CACHE") or f"{tempfile.gettempdir()}/install-cache"


def pip_install(*arguments: str) -> int:
    """Its exit code."""
    command = [*PIP, "install", "--disable-pip-version-check", "--cache-dir", f"{CACHE}/pip"]
    return subprocess.run([*command, *arguments], check=False).returncode


def pip_settings() -> dict[str, str]:
    """Name -> value, as pip's files and PIP_* give them; what PIP_* says counts more."""
    listed = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True)
    found = {}
    # lines such as global.index-url='https://...', or :env:.index-url='...'
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = ast.literal_eval(value)
    return found


def uv_install(uv: str, *arguments: str) -> int:
    """Its exit code."""
    settings = pip_settings()
    # two indexes are one to pip: the best version counts, whichever has it
    command = [uv, "pip", "install", "--python", sys.executable, "--compile-bytecode"]
    command += ["--index-strategy", "unsafe-best-match"]
    for name, option in OPTIONS.items():
        for value in settings.get(name, "").split():
            command += [option, value]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        command.append("--no-index")
    environment = {**os.environ, "UV_CACHE_DIR": f"{CACHE}/uv", "UV_LINK_MODE": "copy"}
    if "cert" in settings:
        environment["SSL_CERT_FILE"] = settings["cert"]
    return subprocess.run([*command, *arguments], check=False, env=environment).returncode


def main() -> int:
    """The exit code of who installed last."""
    with tempfile.TemporaryDirectory() as tools:
        there = pip_install("--quiet", "--target", tools, "-c", "constraints.txt", "uv") == 0
        if there and uv_install(f"{tools}/bin/uv", *sys.argv[1:]) == 0:
            return 0
    print("install.py: without uv; pip does it", file=sys.stderr)
    return pip_install(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
