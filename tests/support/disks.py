# SPDX-License-Identifier: ZPL-2.1
"""Disks that are full."""

from namespaces import mount, run_unshared


class Ballast:
    """A file that fills the rest of a disk."""

    def __init__(self, folder):
        self.path = folder / 'ballast'

    def fill(self):
        with self.path.open('wb', buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def remove(self):
        self.path.unlink()


def run_on_small_disk(function, folder, *args):
    """Call a function with the path of a folder that is a disk of 1 MiB; skip without root."""
    folder = folder / 'disk'
    folder.mkdir()

    def check():
        mount('-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder)
        function(folder, *args)

    run_unshared(check)
