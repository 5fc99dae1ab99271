"""What a hypervisor must show a guest so that it asks for metadata, and the way there.

cloud-init runs `ds-identify` before anything else and stays off unless the machine looks like a cloud. What it
looks at is SMBIOS, or for containers the environment and the command line of process 1. `plan_hints` has what
must be seen for a dialect, `plan_route` how 169.254.169.254 is reached, and `render_snippet` writes both as QEMU,
libvirt, Proxmox or Incus take them.
"""
