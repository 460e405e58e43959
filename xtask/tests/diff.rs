//! Differences between two small ext4 filesystems that `mke2fs` made, inside larger images.

use crate::common::folder;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::diff::{EntryContent, Inventory, InventoryDifference};

/// Where the filesystem begins in the image.
const OFFSET: u64 = 3 * 1024 * 1024;

fn tree(root: &Utf8Path, libc: &str, numpy: &str) {
    let put = |path: &str, content: &[u8], mode: u32| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let status = format!(
        "Package: libc6\nStatus: install ok installed\nVersion: {libc}\nDescription: a\n b\n\n\
         Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n"
    );
    put("var/lib/dpkg/status", status.as_bytes(), 0o644);
    let metadata = format!("Metadata-Version: 2.1\nName: numpy\nVersion: {numpy}\n\nVersion: no\n");
    let info = format!("usr/lib/python3/dist-packages/numpy-{numpy}.dist-info/METADATA");
    put(&info, metadata.as_bytes(), 0o644);
    put("usr/share/other.dist-info/METADATA", b"not a wheel", 0o644);
    // Larger than the read-ahead window, and no two blocks alike.
    let large: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    put("usr/bin/large", &large, 0o755);
    put("etc/same", b"same", 0o644);
    put("etc/empty", b"", 0o644);
    put("etc/content", libc.as_bytes(), 0o644);
    put("etc/mode", b"m", if libc == "1" { 0o644 } else { 0o4755 });
    symlink(format!("v{libc}"), root.join("etc/link")).unwrap();
    put(&format!("etc/only-{libc}"), b"12345", 0o600);
}

fn image(dir: &Utf8Path, libc: &str, numpy: &str) -> Utf8PathBuf {
    let root = dir.join(format!("root-{libc}"));
    tree(&root, libc, numpy);
    let image = dir.join(format!("{libc}.img"));
    fs::write(&image, vec![0xa5; OFFSET as usize]).unwrap();
    let output = Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d", root.as_str(), "-E"])
        .arg(format!("offset={OFFSET},root_owner=0:0"))
        .args([image.as_str(), "16M"])
        .output()
        .expect("mke2fs is needed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    image
}

#[test]
fn an_inventory_is_what_the_filesystem_holds() {
    let (_guard, dir) = folder();
    let found = Inventory::of_ext4(&image(&dir, "1", "1.26.4"), OFFSET).unwrap();
    assert_eq!(found.packages.into_iter().collect::<Vec<_>>(), [("libc6".into(), "1".into())]);
    assert_eq!(found.wheels.into_iter().collect::<Vec<_>>(), [("numpy".into(), "1.26.4".into())]);
    let large = &found.files["/usr/bin/large"];
    let output = Command::new("sha256sum").arg(dir.join("root-1/usr/bin/large")).output().unwrap();
    let expected = String::from_utf8(output.stdout).unwrap()[..64].to_owned();
    assert_eq!((large.mode, large.size), (0o755, 1_200_000));
    assert_eq!(large.content, EntryContent::Sha256(expected));
    assert_eq!(found.files["/etc/link"].content, EntryContent::Link("v1".into()));
}

#[test]
fn a_difference_names_what_changed() {
    let (_guard, dir) = folder();
    let old = Inventory::of_ext4(&image(&dir, "1", "1.26.4"), OFFSET).unwrap();
    let new = Inventory::of_ext4(&image(&dir, "22", "1.26.5"), OFFSET).unwrap();
    let difference = InventoryDifference::between(&old, &new);
    let mut text = Vec::new();
    difference.render_terminal(&mut text).unwrap();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        "\
packages: 0 added, 0 removed, 1 changed
  ~ libc6 1 -> 22
wheels: 0 added, 0 removed, 1 changed
  ~ numpy 1.26.4 -> 1.26.5
files: 2 added, 2 removed, 4 changed, +3 B
  ~ /etc/content  content, +1 B
  ~ /etc/link  link to v1 -> link to v22
  ~ /etc/mode  mode 0644 -> 4755
  - /etc/only-1  5 B
  + /etc/only-22  5 B
  - /usr/lib/python3/dist-packages/numpy-1.26.4.dist-info/METADATA  63 B
  + /usr/lib/python3/dist-packages/numpy-1.26.5.dist-info/METADATA  63 B
  ~ /var/lib/dpkg/status  content, +1 B
"
    );
    let json = difference.to_json().unwrap();
    assert_eq!(serde_json::from_str::<InventoryDifference>(&json).unwrap(), difference);
    assert!(InventoryDifference::between(&old, &old).is_empty());
}

#[test]
fn what_is_no_filesystem_is_refused() {
    let (_guard, dir) = folder();
    let path = dir.join("zero.img");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let error = Inventory::of_ext4(&path, 4096).unwrap_err().to_string();
    assert_eq!(error, format!("reading the ext4 filesystem at byte 4096 of {path}"));
}
