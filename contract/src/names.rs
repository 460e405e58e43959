//! Which texts are valid as a host name, as name and password of a Wi-Fi network, as a country and as an SSH public key:
//! the same on the workstation that writes them and on the robot that applies them.

/// Types of SSH public keys that OpenSSH writes, as their lines begin (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").
const KEY_TYPES: [&str; 3] = ["ssh-", "ecdsa-", "sk-"];

/// Whether it is a valid host name: one label of 1 to 63 lower-case letters, digits and inner hyphens (RFC 1123,
/// section 2.1).
pub fn is_hostname(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Whether a Wi-Fi network can have this name: 1 to 32 bytes (IEEE 802.11). It may contain any byte; the flasher also
/// refuses control characters, which are always mistakes.
pub fn is_ssid(name: &str) -> bool {
    (1..=32).contains(&name.len())
}

/// Whether a password is a derived key, as `wpa_passphrase` prints it: 256 bits in hexadecimal.
pub fn is_wifi_key(password: &str) -> bool {
    password.len() == 64 && password.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a character may be in a passphrase: printable ASCII (IEEE 802.11).
pub fn is_passphrase_character(character: char) -> bool {
    (' '..='~').contains(&character)
}

/// Whether it is a password of a Wi-Fi network: a passphrase of 8 to 63 characters, or a derived
/// [key](is_wifi_key).
pub fn is_wifi_password(password: &str) -> bool {
    let passphrase = (8..=63).contains(&password.len());
    is_wifi_key(password) || (passphrase && password.chars().all(is_passphrase_character))
}

/// Whether a line is a public key as OpenSSH writes it, without options before it. Nothing is decoded.
pub fn is_public_key(line: &str) -> bool {
    KEY_TYPES.iter().any(|kind| line.starts_with(kind)) && !line.chars().any(char::is_control)
}

/// The countries of ISO 3166-1 (alpha-2). For any other code the kernel has no rules, and the radio
/// silently keeps the worldwide rules.
const COUNTRIES: &str = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS \
     BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE \
     EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM \
     HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC \
     LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA \
     NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW \
     SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO \
     TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW";

/// Whether it is a country code for the radio's regulatory domain: two capitals (ISO 3166-1 alpha-2).
pub fn is_country(code: &str) -> bool {
    code.len() == 2 && COUNTRIES.split(' ').any(|known| known == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_one_label() {
        for good in ["a", "robot-7", "7", &"x".repeat(63)] {
            assert!(is_hostname(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a.b", "Robot", "a_b", "é", "a b", &"x".repeat(64)] {
            assert!(!is_hostname(bad), "{bad}");
        }
    }

    #[test]
    fn names_and_passwords_of_networks_are_what_radios_take() {
        assert!(is_ssid("a") && is_ssid(&"é".repeat(16)));
        assert!(!is_ssid("") && !is_ssid(&"é".repeat(17)));
        for good in ["12345678", &" ".repeat(63), &"0f".repeat(32)] {
            assert!(is_wifi_password(good), "{good}");
        }
        for bad in ["1234567", &"x".repeat(64), "pass\u{7f}word", "päßwörter", "line\nbreak"] {
            assert!(!is_wifi_password(bad), "{bad}");
        }
    }

    #[test]
    fn countries_are_those_of_the_standard() {
        for good in ["DE", "GB", "US", "ZW"] {
            assert!(is_country(good), "{good}");
        }
        for bad in ["", "UK", "de", "DEU", "D ", "D", "XX"] {
            assert!(!is_country(bad), "{bad}");
        }
    }
}
