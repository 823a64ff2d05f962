"""The vhost-user protocol, guest memory, virtqueues, virtio-blk, and the application."""
