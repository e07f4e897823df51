"""The version of the package, in one place, and how the versions of other packages are found."""

__version__ = "0.2.0"


def version_of(package: str) -> str:
    """The installed version of a package, or of `python`; "" if it is not installed, and "source"
    for an ftsec_ray that runs from a checkout without being installed.
    """
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    if package == "python":
        return python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return "source" if package == "ftsec_ray" else ""
