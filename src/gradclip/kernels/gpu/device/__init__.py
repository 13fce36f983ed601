"""What the kernels of `kernels.gpu.triton` are made of: functions of the device."""
