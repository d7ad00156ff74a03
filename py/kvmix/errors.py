"""What can go wrong, as classes: one for each status of kvmix.h, each also the builtin that a caller would expect.

KvmixError
+-- ArgumentError   (ValueError)           ARG          an argument is out of range or malformed
+-- OutOfMemory     (MemoryError)          NOMEM        memory would not or did not suffice
+-- ModelIOError    (OSError)              IO           the operating system refused a file operation
+-- FormatError     (ValueError)           FORMAT       the file is damaged or not what it claims to be
+-- Unsupported     (NotImplementedError)  UNSUPPORTED  valid, but not something this build can run
+-- ContextFull                            FULL         the context, or the last free sequence, is used up
+-- DeviceError     (RuntimeError)         DEVICE       a device failed; the session is dead
+-- StateError      (RuntimeError)         STATE        the call does not fit the object's state
+-- Cancelled                              CANCELLED    Session.cancel() stopped the call; the session stays usable
"""


class KvmixError(Exception):
    """Root of all errors of this package; str() is one sentence that says what to do."""


class ArgumentError(KvmixError, ValueError):
    pass


class OutOfMemory(KvmixError, MemoryError):
    pass


class ModelIOError(KvmixError, OSError):
    pass


class FormatError(KvmixError, ValueError):
    pass


class Unsupported(KvmixError, NotImplementedError):
    pass


class ContextFull(KvmixError):
    pass


class DeviceError(KvmixError, RuntimeError):
    pass


class StateError(KvmixError, RuntimeError):
    pass


class Cancelled(KvmixError):
    pass


BY_STATUS: dict[str, type[KvmixError]] = {
    "ARG": ArgumentError,
    "NOMEM": OutOfMemory,
    "IO": ModelIOError,
    "FORMAT": FormatError,
    "UNSUPPORTED": Unsupported,
    "FULL": ContextFull,
    "DEVICE": DeviceError,
    "STATE": StateError,
    "CANCELLED": Cancelled,
}
