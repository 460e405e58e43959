//! The identity of a medium. Path, device numbers and size can be the same for the next card in the
//! same reader, but the kernel counts media, and cards have serial numbers.

use std::os::unix::fs::MetadataExt;

use camino::Utf8Path;

/// The directory in which the kernel describes block devices by their numbers.
pub const KERNEL: &str = "/sys/dev/block";

/// Files below a device's directory with data from its manufacturer. An SD card's register (Linux:
/// Documentation/driver-api/mmc/mmc-dev-attrs.rst), serial numbers of virtio and NVMe disks, and
/// the identifiers of NVMe namespaces and of SCSI and USB disks.
const SERIALS: [&str; 5] = ["device/cid", "serial", "device/serial", "wwid", "device/wwid"];

/// How many bytes of such a number are compared at most; an SD card's has 32.
const MOST: usize = 4096;

/// What distinguishes one medium from the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CardIdentity {
    /// The kernel's count of media: it increases with each medium that is attached or inserted
    /// (`diskseq`, Linux 5.15).
    pub sequence: Option<u64>,
    /// Serial numbers by the files in which they were found.
    pub serials: Vec<(String, String)>,
}

impl CardIdentity {
    /// The medium in the block device of these numbers, in a directory like [`KERNEL`].
    pub fn of_device(kernel: &Utf8Path, numbers: &str) -> Self {
        let dir = kernel.join(numbers);
        let read = |name: &str| {
            let bytes = std::fs::read(dir.join(name)).ok()?;
            let text =
                String::from_utf8_lossy(bytes.get(..MOST).unwrap_or(&bytes)).trim().to_owned();
            (!text.is_empty()).then_some(text)
        };
        let sequence = read("diskseq").and_then(|text| text.parse().ok());
        let found = |name: &&str| Some(((*name).to_owned(), read(name)?));
        Self { sequence, serials: SERIALS.iter().filter_map(found).collect() }
    }

    /// A plain file.
    pub fn of_file(metadata: &std::fs::Metadata) -> Self {
        let number = format!("{}:{}", metadata.dev(), metadata.ino());
        Self { sequence: None, serials: vec![("inode".to_owned(), number)] }
    }

    /// A human-readable description of the difference to another medium; `None`: it is the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        let sequence =
            |of: &Self| of.sequence.map_or("none".to_owned(), |number| number.to_string());
        if self.sequence != now.sequence {
            return Some(format!(
                "this is medium {} (diskseq), but medium {} was shown",
                sequence(now),
                sequence(self)
            ));
        }
        if self.serials != now.serials {
            let show = |of: &Self| {
                let numbers: Vec<String> =
                    of.serials.iter().map(|(name, number)| format!("{name} {number}")).collect();
                if numbers.is_empty() { "no serial number".to_owned() } else { numbers.join(", ") }
            };
            return Some(format!(
                "this medium has {}, but the one that was shown has {}",
                show(now),
                show(self)
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_card_of_the_same_size_in_the_same_reader_is_another_one() {
        let keep = tempfile::tempdir().expect("a directory");
        let kernel = Utf8Path::from_path(keep.path()).expect("UTF-8");
        let write = |name: &str, text: &str| {
            let path = kernel.join("179:0").join(name);
            std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        let look = || CardIdentity::of_device(kernel, "179:0");
        // An old kernel and a reader that reports nothing: nothing to compare.
        assert_eq!(look(), CardIdentity::default());
        write("diskseq", "9\n");
        write("device/cid", "035344534c3136478012345678015a00\n");
        let shown = look();
        assert_eq!((shown.sequence, shown.serials.len()), (Some(9), 1));
        assert_eq!(shown.difference(&look()), None);
        write("diskseq", "10\n");
        let message = shown.difference(&look()).expect("the same card, inserted again");
        assert!(message.contains("medium 10 (diskseq), but medium 9 was shown"), "{message}");
        write("diskseq", "9\n");
        write("device/cid", "035344534c3136478099999999015a00\n");
        let message = shown.difference(&look()).expect("another card");
        assert!(message.contains("cid 035344534c3136478099999999015a00, but"), "{message}");
        std::fs::remove_file(kernel.join("179:0/device/cid")).expect("removed");
        assert!(
            shown
                .difference(&look())
                .is_some_and(|message| message.contains("this medium has no serial number"))
        );
    }
}
