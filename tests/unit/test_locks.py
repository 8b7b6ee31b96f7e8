"""Which mounts cannot lock."""

import pytest

from storage.locks import unlocked_nfs

LOCAL = "29 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
NFS = "99 29 0:52 / /data rw,relatime shared:9 - nfs4 host:/x rw,vers=4.2,{}addr=10.0.0.1"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("local_lock=none,", None),
        ("", None),
        ("nolock,", "nolock"),
        ("local_lock=all,", "local_lock=all"),
        ("nolock,local_lock=flock,", "local_lock=flock,nolock"),
    ],
)
def test_nfs_is_refused_only_when_mounted_without_locking(options: str, found: str | None) -> None:
    assert unlocked_nfs([LOCAL, NFS.format(options)], "0:52") == found


def test_other_filesystems_and_nonsense_are_let_through() -> None:
    assert unlocked_nfs([LOCAL, NFS.format("nolock,")], "8:1") is None
    assert unlocked_nfs(["", "a", "1 2 8:1 - nfs"], "8:1") is None
