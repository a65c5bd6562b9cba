//! The virtio header that stands before every packet on our TUN queues.
//!
//! `struct virtio_net_hdr` of `include/uapi/linux/virtio_net.h`, 10 bytes (no `num_buffers`, the TUN's
//! default size). Its numbers are in the machine's order unless TUNSETVNETLE says otherwise; both are
//! little endian on every machine that Warren runs on.

use super::DropReason;

/// Length of the header.
pub const VNET_HDR_LEN: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds only the pseudo header's sum, not complemented;
/// whoever cuts or receives the packet adds the rest, from `csum_start` to the end.
pub const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksum is right. From a TUN it says that the kernel has checked it;
/// towards a TUN the kernel ignores it (`__virtio_net_hdr_to_skb` in `include/linux/virtio_net.h`; only
/// `drivers/net/virtio_net.c` reads it), so checking a packet for this flag's sake alone buys nothing.
pub const DATA_VALID: u8 = 2;

/// `VIRTIO_NET_HDR_GSO_NONE`: one ordinary packet.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`: TCP over IPv4, to be cut.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_UDP`: one UDP datagram to be fragmented (UFO). Never asked for, so never honoured.
pub const GSO_UDP: u8 = 3;
/// `VIRTIO_NET_HDR_GSO_TCPV6`: TCP over IPv6, to be cut.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`: UDP datagrams of equal size, to be cut apart (USO; kernel 6.2).
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a bit on top of the type: the first segment alone carries CWR (RFC 3168).
pub const GSO_ECN: u8 = 0x80;
/// `VIRTIO_NET_HDR_GSO_ACCECN`, a bit on top of the type (kernel 6.18): CWR is part of Accurate ECN's
/// counter and stands in every segment.
pub const GSO_ACCECN: u8 = 0x10;

/// The header, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// [`GSO_NONE`] and its sisters, perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers. Read from a TUN it is only a hint (`skb_headlen`) and must not be believed.
    pub hdr_len: u16,
    /// Payload of each segment but the last.
    pub gso_size: u16,
    /// Where the checksummed part begins.
    pub csum_start: u16,
    /// Where in that part the checksum field is.
    pub csum_offset: u16,
}

impl VnetHdr {
    /// Splits a TUN read into its header and the packet behind it.
    pub fn decode(bytes: &[u8]) -> Result<(VnetHdr, &[u8]), DropReason> {
        let Some((h, packet)) = bytes.split_first_chunk::<VNET_HDR_LEN>() else {
            return Err(DropReason::BadVirtioHeader);
        };
        let header = VnetHdr {
            flags: h[0],
            gso_type: h[1],
            hdr_len: u16::from_le_bytes([h[2], h[3]]),
            gso_size: u16::from_le_bytes([h[4], h[5]]),
            csum_start: u16::from_le_bytes([h[6], h[7]]),
            csum_offset: u16::from_le_bytes([h[8], h[9]]),
        };
        Ok((header, packet))
    }

    /// The bytes that go before the packet.
    pub const fn encode(&self) -> [u8; VNET_HDR_LEN] {
        let (len, size) = (self.hdr_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let (start, offset) = (self.csum_start.to_le_bytes(), self.csum_offset.to_le_bytes());
        [
            self.flags,
            self.gso_type,
            len[0],
            len[1],
            size[0],
            size[1],
            start[0],
            start[1],
            offset[0],
            offset[1],
        ]
    }

    /// The type without its ECN bits.
    pub const fn gso(&self) -> u8 {
        self.gso_type & !(GSO_ECN | GSO_ACCECN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_there_and_back() {
        let header = VnetHdr {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            hdr_len: 52,
            gso_size: 1368,
            csum_start: 20,
            csum_offset: 16,
        };
        let mut bytes = header.encode().to_vec();
        assert_eq!(bytes, [1, 0x81, 52, 0, 0x58, 0x05, 20, 0, 16, 0]);
        bytes.extend([1, 2, 3]);
        assert_eq!(VnetHdr::decode(&bytes), Ok((header, &[1u8, 2, 3][..])));
        assert_eq!(header.gso(), GSO_TCPV4);
    }

    #[test]
    fn a_short_read_is_refused() {
        assert_eq!(VnetHdr::decode(&[0; 9]), Err(DropReason::BadVirtioHeader));
        assert_eq!(VnetHdr::decode(&[0; 10]), Ok((VnetHdr::default(), &[][..])));
    }
}
