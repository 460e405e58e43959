//! One file for each verb of the command line.

pub mod bench;
pub mod build_image;
pub mod buildroot;
pub mod check;
pub mod clean;
pub mod doctor;
pub mod flash;
pub mod inspect;
pub mod keys;
pub mod lock;
pub mod plan;
pub mod publish;
pub mod push;
pub mod release;
pub mod run;
pub mod verify;
