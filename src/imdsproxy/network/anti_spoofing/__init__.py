"""MAC filters and hop limits: rules in the kernel that let guests read only their own metadata."""
