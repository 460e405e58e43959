//! Accounts: lines in passwd, group and shadow, home directories, and the public keys that SSH
//! accepts. The root filesystem is read-only, so accounts are created by the build.

use anyhow::{Context, Result, bail};

use crate::plan::UserPlan;
use crate::render::RenderedFiles;
use crate::rootfs::tree::{EntryOrigin, RootEntry, RootEntryKind, RootTree};

/// Adds or changes the plan's accounts.
///
/// # Errors
/// An unknown group; an id that the base system already uses; a missing passwd.
pub fn add_users(tree: &mut RootTree, users: &[UserPlan], rendered: &RenderedFiles) -> Result<()> {
    let mut passwd = Table::read(tree, "etc/passwd", 0o644)?;
    let mut group = Table::read(tree, "etc/group", 0o644)?;
    let mut shadow = Table::read(tree, "etc/shadow", 0o640)?;
    for user in users {
        let (name, uid) = (&user.name, user.uid.to_string());
        let taken = |row: &&Vec<String>| row.get(2) == Some(&uid) && row.first() != Some(name);
        if let Some(other) = passwd.rows.iter().find(taken) {
            bail!(
                "adding the account {name}: uid {uid} is already used by the base system's {}",
                other[0]
            );
        }
        passwd.set(name, &["x", &uid, &uid, "", &user.home, &user.shell]);
        group.set(name, &["x", &uid, ""]);
        let secret = match user.password.as_str() {
            "locked" => "*",
            "empty" => "",
            hash => hash,
        };
        // No dates: the age of a password is meaningless on a machine without a clock.
        shadow.set(name, &[secret, "", "0", "99999", "7", "", "", ""]);
        for extra in &user.groups {
            group.add_member(extra, name).with_context(|| {
                format!(
                    "adding the account {name}\nhelp: correct `groups`: the packages of the base system define them"
                )
            })?;
        }
        let keys = rendered.authorized_keys.get(name).map_or("", String::as_str);
        if !keys.is_empty() {
            tree.file(&format!("etc/ssh/authorized_keys.d/{name}"), 0o644, keys)?;
        }
        // Homes below /data are created on the robot, where data is writable.
        let home = user.home.trim_start_matches('/');
        if user.uid != 0 && !home.starts_with("data/") {
            let others = |entry: &&RootEntry| {
                matches!(entry.origin, EntryOrigin::Base | EntryOrigin::Api)
                    && entry.uid != user.uid
            };
            if let Some(there) = tree.get(home).filter(others) {
                bail!(
                    "adding the account {name}: its home /{home} exists already, from {}, and \
                     belongs to the user {}\n\
                     help: give the account a separate `home`, such as \"/data/home/{name}\"",
                    there.origin,
                    there.uid
                );
            }
            let mut entry = RootEntry::new(0o750, RootEntryKind::Folder, EntryOrigin::Compose);
            (entry.uid, entry.gid) = (user.uid, user.uid);
            tree.insert(home, entry)?;
        }
    }
    passwd.write(tree)?;
    group.write(tree)?;
    shadow.write(tree)
}

/// One of the colon-separated files.
struct Table {
    path: &'static str,
    mode: u32,
    gid: u32,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn read(tree: &RootTree, path: &'static str, mode: u32) -> Result<Self> {
        let bytes = tree.read(path).context("adding accounts")?;
        let text = String::from_utf8(bytes).with_context(|| format!("/{path} is not UTF-8"))?;
        let rows = text
            .lines()
            .filter(|line| !line.is_empty())
            .map(|line| line.split(':').map(str::to_owned).collect())
            .collect();
        let gid = tree.get(path).map_or(0, |entry| entry.gid);
        Ok(Self { path, mode, gid, rows })
    }

    fn set(&mut self, name: &str, fields: &[&str]) {
        let mut row = vec![name.to_owned()];
        row.extend(fields.iter().map(|f| (*f).to_owned()));
        match self.rows.iter_mut().find(|r| r.first().is_some_and(|n| n == name)) {
            Some(there) => *there = row,
            None => self.rows.push(row),
        }
    }

    fn add_member(&mut self, group: &str, member: &str) -> Result<()> {
        let row = self.rows.iter_mut().find(|r| r.first().is_some_and(|n| n == group));
        let Some(members) = row.and_then(|r| r.get_mut(3)) else {
            bail!("there is no group {group}");
        };
        if !members.split(',').any(|m| m == member) {
            if !members.is_empty() {
                members.push(',');
            }
            members.push_str(member);
        }
        Ok(())
    }

    fn write(&self, tree: &mut RootTree) -> Result<()> {
        let text: String = self.rows.iter().map(|row| row.join(":") + "\n").collect();
        tree.file(self.path, self.mode, text)?;
        let mut entry = tree.get(self.path).context("it was just placed")?.clone();
        entry.gid = self.gid;
        tree.insert(self.path, entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::tree::FileData;

    fn tree() -> RootTree {
        let mut tree = RootTree::default();
        tree.file(
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n",
        )
        .expect("placed");
        tree.file("etc/group", 0o644, "root:x:0:\nvideo:x:44:\n").expect("placed");
        tree.file("etc/shadow", 0o640, "root:*:1:0:99999:7:::\n").expect("placed");
        tree
    }

    fn user(uid: u32, group: &str) -> UserPlan {
        UserPlan {
            name: "robot".into(),
            uid,
            groups: vec![group.into()],
            shell: "/bin/sh".into(),
            home: "/home/robot".into(),
            password: "locked".into(),
            authorized_keys: vec![],
        }
    }

    fn rendered() -> RenderedFiles {
        RenderedFiles {
            overlay: vec![],
            boot: Default::default(),
            defconfig: None,
            authorized_keys: [("robot".to_owned(), "ssh-ed25519 AAAA x\n".to_owned())].into(),
        }
    }

    #[test]
    fn accounts_get_their_lines_groups_home_and_keys() {
        let mut tree = tree();
        add_users(&mut tree, &[user(1000, "video")], &rendered()).expect("added");
        let text = |path: &str| String::from_utf8(tree.read(path).expect("there")).expect("UTF-8");
        assert!(text("etc/passwd").ends_with("robot:x:1000:1000::/home/robot:/bin/sh\n"));
        assert!(text("etc/group").contains("video:x:44:robot\n"));
        assert!(text("etc/shadow").contains("robot:*::0:99999:7:::\n"));
        assert_eq!(text("etc/ssh/authorized_keys.d/robot"), "ssh-ed25519 AAAA x\n");
        assert_eq!(tree.get("home/robot").map(|e| (e.uid, e.mode)), Some((1000, 0o750)));
    }

    #[test]
    fn a_home_is_nobody_elses_folder() {
        let mut tree = tree();
        let of_base = RootEntry::new(0o755, RootEntryKind::Folder, EntryOrigin::Base);
        tree.insert("home/robot", of_base).expect("placed");
        let error =
            add_users(&mut tree, &[user(1000, "video")], &rendered()).expect_err("the base's");
        assert!(format!("{error:#}").contains("its home /home/robot exists already"), "{error:#}");
        // A product's overlay may have put something into it.
        let mut tree = self::tree();
        let origin = EntryOrigin::Overlay("overlays/x/home/robot/.profile".into());
        let profile = RootEntry::new(0o644, RootEntryKind::File(FileData::Bytes(vec![])), origin);
        tree.insert("home/robot/.profile", profile).expect("placed");
        add_users(&mut tree, &[user(1000, "video")], &rendered()).expect("added");
        assert_eq!(tree.get("home/robot").map(|e| (e.uid, e.mode)), Some((1000, 0o750)));
    }

    #[test]
    fn a_taken_id_and_an_unknown_group_are_refused() {
        let error = add_users(&mut tree(), &[user(1, "video")], &rendered()).expect_err("taken");
        assert!(
            format!("{error:#}").contains("uid 1 is already used by the base system's daemon"),
            "{error:#}"
        );
        let error =
            add_users(&mut tree(), &[user(1000, "vidoe")], &rendered()).expect_err("unknown");
        assert!(format!("{error:#}").contains("there is no group vidoe"), "{error:#}");
    }
}
