"""Vulkan devices of this machine, asked of the system's loader without any package but the standard library.

Also a script, for use before anything is installed: prints the devices and exits 1 if ManiSkill can use none.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import NamedTuple

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
    def mesa(self) -> tuple[int, int] | None:
        """Major and minor version of Mesa; None for other drivers."""
        match = re.search(r"Mesa (\d+)\.(\d+)", self.driver)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def usable(self) -> bool:
        """True for a GPU, and for a software renderer that is recent enough."""
        return not self.is_cpu or self.mesa is None or self.mesa >= MESA_MIN


class _ApplicationInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("application_name", ctypes.c_char_p),
        ("application_version", ctypes.c_uint32),
        ("engine_name", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
    ]


class _InstanceCreateInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application_info", ctypes.POINTER(_ApplicationInfo)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    ]


class _DriverProperties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("info", ctypes.c_char * 256),
        ("conformance", ctypes.c_uint8 * 4),
    ]


class _Properties2(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("api_version", ctypes.c_uint32),
        ("driver_version", ctypes.c_uint32),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("device_type", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("rest", ctypes.c_uint64 * 256),  # cache id, limits and sparse properties: 800 bytes, of no use here
    ]


def devices() -> list[Device]:
    """All Vulkan devices, GPUs and software renderers.

    :raises VulkanError: if there is no loader, or no driver that it can load
    """
    try:
        vk = ctypes.CDLL(LOADER)
    except OSError as error:
        raise VulkanError(f"no Vulkan loader: {error}") from error
    application = _ApplicationInfo(type=_APPLICATION_INFO, api_version=_API_1_2)
    info = _InstanceCreateInfo(type=_INSTANCE_CREATE_INFO, application_info=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    result = vk.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance))
    if result != 0:
        raise VulkanError(f"the Vulkan loader finds no driver (VkResult {result})")
    try:
        count = ctypes.c_uint32()
        vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        return [_device(vk, handle) for handle in handles]
    finally:
        vk.vkDestroyInstance(instance, None)


def _device(vk: ctypes.CDLL, handle: int | None) -> Device:
    driver = _DriverProperties(type=_DRIVER_PROPERTIES)
    properties = _Properties2(type=_PROPERTIES_2, next=ctypes.cast(ctypes.pointer(driver), ctypes.c_void_p))
    vk.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(handle), ctypes.byref(properties))
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
