//! The API wheel and everything that it needs: resolved once into a lock, downloaded by hash,
//! checked file by file, and installed as a standard installer would, into a tar that is added to
//! the base. This never runs on the target and never queries an index while a build runs from its
//! cache.

pub mod archive;
pub mod base;
pub mod bytecode;
pub mod check;
pub mod component;
pub mod fetch;
pub mod install;
pub mod lock;
pub mod metadata;
pub mod pip;
pub mod resolve;
pub mod target;

pub use archive::CheckedWheel;
pub use base::BasePython;
pub use check::{BaseDistribution, check_wheels};
pub use component::{WheelComponent, WheelComponentRequest};
pub use fetch::{DownloadedWheel, fetch_wheels};
pub use install::{
    InstallRequest, InstallTarget, InstalledDistribution, InstalledFile, InstalledWheels,
    install_wheels, preview_files,
};
pub use lock::{LockedWheel, WheelLock, lock_identity};
pub use resolve::{LockRequest, lock_wheels, update_lock};
pub use target::{Libc, PythonVersion, WheelTarget};
