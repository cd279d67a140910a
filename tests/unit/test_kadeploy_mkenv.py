"""What `mkenv` packs: the same bytes for the same files, and secrets for root alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kadeploy.mkenv import UNWANTED, make_site, remove
from tests.support.loop_disk import lacking

_WHY = lacking("cpio", "zstd", "ssh-keygen")
pytestmark = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))

KEY = "ssh-ed25519 AAAAC3Nz root@head"


def test_mkenv_packs_the_same_site_to_the_same_bytes_and_keeps_its_host_key(tmp_path: Path) -> None:
    list(make_site(tmp_path, [KEY]))
    made = {name: (tmp_path / name).read_bytes() for name in ("site.img", "known_hosts")}
    list(make_site(tmp_path, [KEY]))
    assert made == {name: (tmp_path / name).read_bytes() for name in made}
    assert made["known_hosts"].startswith(b"kadeploy-environment ssh-ed25519 ")


def test_mkenv_lets_nobody_but_root_read_keys(tmp_path: Path) -> None:
    list(make_site(tmp_path, [KEY]))
    archive = subprocess.run(
        ["zstd", "-dc", tmp_path / "site.img"], capture_output=True, check=True
    )
    listed = subprocess.run(
        ["cpio", "-tv", "--quiet"], input=archive.stdout, capture_output=True, check=True
    ).stdout.decode()
    modes = {line.split()[-1]: line.split()[0] for line in listed.splitlines()}
    assert modes["etc/ssh/ssh_host_ed25519_key"] == "-rw-------"
    assert modes["root/.ssh/authorized_keys"] == "-rw-------"
    assert modes["root"] == modes["root/.ssh"] == "drwx------"


def test_mkenv_leaves_out_drivers_that_write_no_disk_and_keeps_those_that_do(
    tmp_path: Path,
) -> None:
    kernel = "usr/lib/modules/6.1.0/kernel"
    kept = {f"{kernel}/drivers/net/ethernet/e1000.ko", f"{kernel}/fs/xfs/xfs.ko"}
    gone = {f"{kernel}/drivers/gpu/drm/drm.ko", f"{kernel}/sound/snd.ko"}
    for name in kept | gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove(tmp_path, UNWANTED)
    files = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert files == kept
