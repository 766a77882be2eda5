"""What this machine is and can: its identity, measured limits, host memory, system calls."""
