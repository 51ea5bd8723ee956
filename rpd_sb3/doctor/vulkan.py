"""Vulkan devices of this machine, from the system's loader and with the standard library alone.

Also a script, for use before anything is installed: prints the devices and exits 1 if ManiSkill can use none.
"""

from __future__ import annotations

import ctypes
import re
import sys
from ctypes import Structure, byref, c_char, c_char_p, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

LOADER = "libvulkan.so.1"
MESA_MIN = (23, 2)
"""First Mesa whose software renderer (llvmpipe) runs SAPIEN; 22.3 fails with "failed to find a rendering device"."""

_CPU = 4  # VK_PHYSICAL_DEVICE_TYPE_CPU
_INSTANCE_CREATE_INFO, _APPLICATION_INFO = 1, 0  # VkStructureType
_PROPERTIES_2, _DRIVER_PROPERTIES = 1000059001, 1000196000
_API_1_2 = (1 << 22) | (2 << 12)


class VulkanError(RuntimeError):
    """The loader is missing or refuses to work."""


class Device(NamedTuple):
    """One Vulkan device."""

    name: str
    driver: str
    """What the driver says of itself, e.g. ``Mesa 25.0.7 (LLVM 15.0.6)``."""
    is_cpu: bool

    @property
    def usable(self) -> bool:
        """True for a GPU, and for a software renderer that is recent enough."""
        mesa = re.search(r"Mesa (\d+)\.(\d+)", self.driver)
        return not self.is_cpu or mesa is None or (int(mesa[1]), int(mesa[2])) >= MESA_MIN


def _struct(**fields: Any) -> type[Structure]:
    """A structure of C with these fields, in this order."""
    return type("Struct", (Structure,), {"_fields_": list(fields.items())})


_ApplicationInfo = _struct(
    type=c_int, next=c_void_p, name=c_char_p, version=c_uint32, engine=c_char_p, engine_version=c_uint32, api=c_uint32
)
_InstanceCreateInfo = _struct(
    type=c_int,
    next=c_void_p,
    flags=c_uint32,
    application=c_void_p,
    n_layers=c_uint32,
    layers=c_void_p,
    n_extensions=c_uint32,
    extensions=c_void_p,
)
_DriverProperties = _struct(
    type=c_int, next=c_void_p, id=c_int, name=c_char * 256, info=c_char * 256, conformance=c_uint8 * 4
)
# The rest: cache id, limits and sparse properties, 800 bytes that are not needed here.
_Properties2 = _struct(
    type=c_int,
    next=c_void_p,
    versions_and_ids=c_uint32 * 4,
    device_type=c_int,
    name=c_char * 256,
    rest=c_uint64 * 256,
)


def devices() -> list[Device]:
    """All Vulkan devices, GPUs and software renderers.

    :raises VulkanError: if there is no loader, or no driver that it can load
    """
    try:
        vk = ctypes.CDLL(LOADER)
    except OSError as error:
        raise VulkanError(f"no Vulkan loader: {error}") from error
    application = _ApplicationInfo(type=_APPLICATION_INFO, api=_API_1_2)
    info = _InstanceCreateInfo(type=_INSTANCE_CREATE_INFO, application=ctypes.addressof(application))
    instance = c_void_p()
    result = vk.vkCreateInstance(byref(info), None, byref(instance))
    if result != 0:
        raise VulkanError(f"the Vulkan loader finds no driver (VkResult {result})")
    try:
        count = c_uint32()
        vk.vkEnumeratePhysicalDevices(instance, byref(count), None)
        handles = (c_void_p * count.value)()
        vk.vkEnumeratePhysicalDevices(instance, byref(count), handles)
        return [_device(vk, handle) for handle in handles]
    finally:
        vk.vkDestroyInstance(instance, None)


def _device(vk: ctypes.CDLL, handle: int | None) -> Device:
    driver = _DriverProperties(type=_DRIVER_PROPERTIES)
    properties = _Properties2(type=_PROPERTIES_2, next=ctypes.addressof(driver))
    vk.vkGetPhysicalDeviceProperties2(c_void_p(handle), byref(properties))
    return Device(properties.name.decode(), driver.info.decode(), properties.device_type == _CPU)


def main() -> int:
    """Print the devices; 0 if ManiSkill can use one of them."""
    try:
        found = devices()
    except VulkanError as error:
        print(error, file=sys.stderr)
        return 1
    for device in found:
        print(f"{device.name}, {device.driver}{'' if device.usable else ' (too old)'}")
    return 0 if any(device.usable for device in found) else 1


if __name__ == "__main__":
    sys.exit(main())
